"""`dinov3-client fit-projection`: write principal components as a projection for the server."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dinov3_client import _safetensors
from dinov3_client._client import Client
from dinov3_client._dtypes import Array
from dinov3_client._errors import Dinov3Error, ModelMismatch
from dinov3_client._features import Features
from dinov3_client._model import Model
from dinov3_client._pictures.pca import Components, Moments
from dinov3_client._request import Layer
from dinov3_client.bulk.extraction import SLACK_BYTES
from dinov3_client.bulk.reading import ImageReader
from dinov3_client.cli.common import (
    FailureLog,
    UsageError,
    add_fit_flags,
    add_picture_flags,
    add_size_flag,
    connect,
    fit_of,
    get_model,
    iter_images,
    layer_numbers,
    print_line,
)
from dinov3_serving.presets import PresetName

# Enough to keep a server busy.
BATCH_IMAGES = 32
IN_FLIGHT = 4

# The names that the server's setting `projections` accepts.
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]+\.safetensors")


def add(commands: Any, server: argparse.ArgumentParser) -> None:
    fit = commands.add_parser(
        "fit-projection",
        parents=[server],
        help="fit a projection of patches to fewer channels by principal components",
        description="Writes the first principal components of the patches of all images as a projection for the server "
        "(setting `projections`): weight [K, D] and bias [K], float32, with weight @ (patch - mean) = weight @ patch + "
        "bias. Memory does not grow with the number of images.",
    )
    fit.add_argument("sources", nargs="+", metavar="SOURCE", help="files and folders of images, globs, tar shards")
    fit.add_argument(
        "-o",
        "--output",
        type=_projection_file,
        required=True,
        metavar="FILE",
        help="such as pca64.safetensors; its name becomes the projection's",
    )
    fit.add_argument("--channels", type=int, default=64, metavar="K", help="channels to keep (default: %(default)s)")
    fit.add_argument("--layer", type=int, metavar="I", help="use the patches of this layer (default: the last)")
    fit.add_argument("--preset", choices=get_args(PresetName), default="dinov3", help="default: %(default)s")
    add_size_flag(fit, None, "the preset's")
    add_fit_flags(fit)
    add_picture_flags(fit)
    fit.set_defaults(command=_fit)


def _fit(args: argparse.Namespace) -> int:
    output: Path = args.output
    failures = FailureLog()
    with connect(args) as client:
        model = get_model(client)
        layer = None if args.layer is None else layer_numbers((args.layer,), model)[0]
        channels = model.layer_dims[-1 if layer is None else layer]
        if not 0 < args.channels <= channels:
            raise UsageError(f"--channels {args.channels}: the patches have {channels}; allowed are 1 to {channels}")
        moments, images = Moments(channels), 0
        for tokens in _patches(args, client, model, layer, failures):
            moments.add(tokens)
            images += 1
    if moments.count <= args.channels:
        raise Dinov3Error(
            f"{images} images have {moments.count} patches, too few for {args.channels} principal components"
        )
    components = moments.components(args.channels)
    total = components.total_variance
    kept = np.cumsum(components.variances) / total if total else np.ones(args.channels)
    of_layer = {} if layer is None else {"layer": str(layer)}
    metadata = {
        "model": model.name,
        "weights": model.weights,
        "fingerprint": model.fingerprint,
        **of_layer,
        "images": str(images),
        "patches": str(moments.count),
        "explained_variance": f"{kept[-1]:.6f}",
    }
    _safetensors.write(output, projection(components), metadata)
    print_line(f"{output}: {args.channels} of {channels} channels, from {moments.count:,} patches of {images:,} images")
    print_line(f"explained variance: {_explained_variance(kept)}")
    print_line(f"for the server:     --projections {shlex.quote(f'{output.stem}={output.resolve()}')}")
    print_line(f'for the client:     projection="{output.stem}"')
    return 1 if failures.count else 0


def projection(components: Components) -> dict[str, Array]:
    """Return `weight` [K, D] and `bias` [K], float32: weight @ x + bias are x's coordinates along the components."""
    weight = components.directions.astype(np.float32)
    bias = -(weight.astype(np.float64) @ components.mean)  # of the rounded weight, so that the mean maps to 0
    return {"weight": weight, "bias": bias.astype(np.float32)}


def _patches(
    args: argparse.Namespace, client: Client, model: Model, layer: int | None, failures: FailureLog
) -> Iterator[Array]:
    """Yield the patches [P, D] of each image; log images that fail."""
    for images in iter_images(args.sources, failures):
        most_bytes = model.limits.max_message_bytes - SLACK_BYTES
        with ImageReader(images, range(len(images)), most_bytes=most_bytes, batch_images=BATCH_IMAGES) as reader:
            answers = client.extract_many(
                reader.batches(),
                ("patches",) if layer is None else (),
                in_flight=IN_FLIGHT,
                preset=args.preset,
                size=args.size,
                exif=args.exif,
                fit=fit_of(args),
                background=args.background,
                allow_truncated=args.allow_truncated,
                layers=() if layer is None else Layer(layer, "patches"),
                priority="bulk",
                on_error="return",
            )
            with closing(answers):
                for answer in answers:
                    _check_same(answer, model)
                    sent = []
                    for entry in reader.sent.popleft():
                        if entry.reason:
                            failures(entry.item.source, entry.reason)
                        else:
                            sent.append(entry)
                    for index, entry in enumerate(sent):
                        image = answer[index]
                        if image.error is not None:
                            failures(entry.item.source, image.error.message)
                            continue
                        patches = (image if layer is None else image.layers[layer]).patches
                        assert patches is not None, "asked for"
                        reader.fit(patches.nbytes)
                        yield patches
            for entry in reader.rest:
                failures(entry.item.source, entry.reason)


def _check_same(answer: Features, model: Model) -> None:
    if answer.fingerprint != model.fingerprint:
        raise ModelMismatch(
            f"the server now serves another model: its fingerprint is {answer.fingerprint}, and "
            f"the run began with {model.fingerprint}; run it again"
        )


def _projection_file(text: str) -> Path:
    path = Path(text)
    if not _FILE_NAME.fullmatch(path.name):
        raise argparse.ArgumentTypeError(
            f"{text}: it must be NAME.safetensors, with a NAME of letters, digits, - and _"
        )
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    return path


def _explained_variance(kept: Array) -> str:
    """Return the explained variance of the first 8, 16, 32, ... and of all channels, as text."""
    counts = [1 << power for power in range(3, 13) if 1 << power < len(kept)] + [len(kept)]
    return ", ".join(f"{count} channels {kept[count - 1]:.1%}" for count in counts)
