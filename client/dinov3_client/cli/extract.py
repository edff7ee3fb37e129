"""`dinov3-client extract`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dinov3_client import _files
from dinov3_client._features import LayerFeatures
from dinov3_client._files import Extracted, Options
from dinov3_client._model import Model
from dinov3_client._request import Preset, TokenKind
from dinov3_client.cli.common import Failures, UsageError, add_size, connect, known_model, layer_numbers, numbers, say


def add(commands: Any, server: argparse.ArgumentParser, images: argparse.ArgumentParser) -> None:
    extract = commands.add_parser(
        "extract",
        parents=[images, server],
        help="features of images, one npz file each",
        description="Writes DIR/STEM.npz for each image (in the place of an older one), with an array for each output "
        "(cls [D], patches [P, D], registers [G, D]) and grid, those of layers as layerI_..., input_size, and where it "
        "all came from. Broken images are named and left out; the exit code is 1 then.",
    )
    extract.add_argument("--out", type=Path, required=True, metavar="DIR")
    extract.add_argument("--preset", choices=get_args(Preset), default="dinov3", help="default: %(default)s")
    add_size(extract, None, "the preset's")
    extract.add_argument(
        "--outputs",
        type=_outputs,
        default=("cls", "patches"),
        metavar="KIND,...",
        help="cls, patches, registers; default: cls,patches",
    )
    extract.add_argument(
        "--layers",
        type=numbers,
        default=(),
        metavar="I,...",
        help="layers whose outputs come as well; negative ones count from the end (--layers=-4,-1)",
    )
    extract.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="default: %(default)s; npz has no bfloat16"
    )
    extract.set_defaults(command=_extract)


def _extract(args: argparse.Namespace) -> int:
    out: Path = args.out
    targets = _targets(args.images, out)
    with connect(args) as client:
        model = known_model(client)
        options = Options(
            args.outputs, args.preset, args.size, args.dtype, layer_numbers(args.layers, model), args.exif
        )
        out.mkdir(parents=True, exist_ok=True)
        failures = Failures()
        for done in _files.extract(client, model, args.images, options, failures):
            with _files.replacing(targets[done.path]) as draft, draft.open("wb") as file:
                np.savez(file, **_contents(done, model, options))
    written = len(args.images) - failures.count
    say(f"{written} of {len(args.images)} images written to {out}")
    return 1 if failures.count else 0


def _targets(images: Sequence[Path], out: Path) -> dict[Path, Path]:
    """The file of each image; two images never share one."""
    owners: dict[str, Path] = {}
    for image in images:
        name = f"{image.stem}.npz"
        if name in owners:
            raise UsageError(
                f"{owners[name]} and {image} would both become {out / name}; give each image once, "
                "and images of equal names to runs with an --out of their own"
            )
        owners[name] = image
    return {image: out / name for name, image in owners.items()}


def _contents(done: Extracted, model: Model, options: Options) -> dict[str, Any]:
    """What an npz holds. Text is in arrays of no dimension: `str(file["model"])`."""
    named: list[tuple[str, LayerFeatures]] = [("", done.features)]
    named += [(f"layer{layer}_", features) for layer, features in done.features.layers.items()]
    return {
        **{f"{prefix}{kind}": getattr(features, kind) for prefix, features in named for kind in options.outputs},
        **{f"{prefix}grid": np.array(features.grid) for prefix, features in named},
        "input_size": np.array(done.features.input_size),
        "preset": np.array(options.preset),
        "exif": np.array(options.exif),
        "source": np.array(str(done.path)),
        "model": np.array(model.name),
        "weights": np.array(model.weights),
        "fingerprint": np.array(done.answer.fingerprint),
    }


def _outputs(text: str) -> tuple[TokenKind, ...]:
    kinds = [kind for kind in get_args(TokenKind) if kind in text.split(",")]
    unknown = [name for name in text.split(",") if name not in kinds]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no output; cls, patches and registers are")
    return tuple(kinds)
