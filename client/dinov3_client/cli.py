"""`dinov3-client`: a server's model, features of photos as npz files, pictures of features.

Exit codes: 0 done, 1 failed (in whole or for some images, each named on stderr), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image, ImageOps

from dinov3_client import _files, _pca, _picture
from dinov3_client._client import Client
from dinov3_client._errors import Dinov3Error
from dinov3_client._features import LayerFeatures
from dinov3_client._files import Extracted, Options
from dinov3_client._model import Model
from dinov3_client._request import Preset, TokenKind, check_deadline

DEFAULT_TARGET = "localhost:50051"
# A finer grid than the preset's 16 x 16: 32 x 32 patches show shapes.
PCA_SIDE = 512


class UsageError(Exception):
    """What argparse cannot see by itself."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except UsageError as error:
        parser.error(str(error))
    except (Dinov3Error, OSError) as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130


def _info(args: argparse.Namespace) -> int:
    with _connect(args) as client:
        model = client.model()
    limits = model.limits
    rows = {
        "model": model.name,
        "weights": model.weights + (" (random: features have no meaning)" if model.random_weights else ""),
        "fingerprint": model.fingerprint,
        "parameters": f"{model.parameters:,}",
        "shape": f"{_each(model.layer_dims)} channels, {model.depth} layers, patch {_each(model.layer_strides)}, "
        f"{model.register_tokens} registers",
        "computes in": f"{model.dtype} on {', '.join(model.devices)}",
        "mean, std": f"{_rounded(model.mean)}, {_rounded(model.std)}",
        "limits": f"{limits.max_images_per_request} images and {limits.max_message_bytes:,} bytes a request; "
        f"{limits.max_image_pixels:,} pixels and {limits.max_image_tokens:,} tokens an image",
        "certificate": _certified(model),
        "server": f"{model.server_version}, {model.frontends} frontend{'s' if model.frontends != 1 else ''}",
    }
    _say("\n".join(f"{name:<12} {value}" for name, value in rows.items()))
    return 0


def _certified(model: Model) -> str:
    certificate = model.certificate
    if not certificate.verified:
        return f"not verified: {certificate.reason}"
    cosines = ", ".join(
        f"{proof.output} cosine {proof.least_cosine:.6f}" for proof in certificate.outputs if proof.dtype == model.dtype
    )
    return f"verified against Meta's code at {certificate.upstream_revision[:12]}: {cosines} in {model.dtype}"


def _extract(args: argparse.Namespace) -> int:
    out: Path = args.out
    targets = _targets(args.images, out)
    with _connect(args) as client:
        model = _model(client)
        options = Options(args.outputs, args.preset, args.size, args.dtype, _layers(args.layers, model), args.exif)
        out.mkdir(parents=True, exist_ok=True)
        failures = _Failures()
        for done in _files.extract(client, model, args.images, options, failures):
            with _files.replacing(targets[done.path]) as draft, draft.open("wb") as file:
                np.savez(file, **_contents(done, model, options))
    written = len(args.images) - failures.count
    _say(f"{written} of {len(args.images)} images written to {out}")
    return 1 if failures.count else 0


def _pca_picture(args: argparse.Namespace) -> int:
    image_format = Image.registered_extensions().get(args.output.suffix.lower())
    if image_format not in Image.SAVE:
        raise UsageError(f"-o {args.output}: its ending names no image format to write; .png does")
    if not args.output.parent.is_dir():
        raise UsageError(f"-o {args.output}: there is no folder {args.output.parent}")
    # The server has its own limit (`max_image_pixels`): what passed that is no bomb, whatever Pillow thinks.
    Image.MAX_IMAGE_PIXELS = None
    with _connect(args) as client:
        model = _model(client)
        layers = () if args.layer is None else _layers((args.layer,), model)
        options = Options(("patches",), "dinov3", args.size, "float16", layers, args.exif)
        failures = _Failures()
        names, photos, patches, grids = [], [], [], []
        for done in _files.extract(client, model, args.images, options, failures):
            photo = Image.open(io.BytesIO(done.data))
            names.append(done.path.name)
            photos.append(_picture.thumbnail(ImageOps.exif_transpose(photo) if args.exif else photo))
            shown = done.features.layers[layers[0]] if layers else done.features
            assert shown.patches is not None, "asked for"
            patches.append(shown.patches)
            grids.append(shown.grid)
    if not photos:
        raise Dinov3Error("no image left to draw")
    maps = [
        Image.fromarray(colours.reshape(*grid, 3)) for colours, grid in zip(_pca.colours(patches), grids, strict=True)
    ]
    caption = (
        f"{model.name}{' (random weights)' if model.random_weights else ''}: principal components 1-3 of "
        f"{grids[0][0]} x {grids[0][1]} patches{f' of layer {layers[0]}' if layers else ''} as RGB"
    )
    picture = _picture.draw(list(map(_picture.Pair, names, photos, maps)), caption)
    with _files.replacing(args.output) as draft, draft.open("wb") as file:
        picture.save(file, image_format)
    _say(f"{args.output}: {len(photos)} of {len(args.images)} images, {picture.width}x{picture.height}")
    return 1 if failures.count else 0


class _Failures:
    """Says each on stderr as it comes."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, path: Path, reason: str) -> None:
        self.count += 1
        _complain(f"{path}: {reason}")


def _connect(args: argparse.Namespace) -> Client:
    try:
        token = args.token_file.read_text("ascii").strip() if args.token_file else os.environ.get("DINOV3_TOKEN")
        return Client(args.target, deadline=args.deadline, token=token, tls_ca=args.tls_ca)
    except UnicodeDecodeError:
        raise UsageError(f"--token-file {args.token_file}: it holds no token: other characters than ASCII") from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def _model(client: Client) -> Model:
    model = client.model()
    if model.random_weights:
        _complain(f"note: the server's weights are random ({model.weights}): its features have no meaning")
    return model


def _layers(asked: Sequence[int], model: Model) -> tuple[int, ...]:
    """As numbers from 0 on, so that a file's names say the same whatever the model's depth."""
    for layer in asked:
        if not -model.depth <= layer < model.depth:
            raise UsageError(f"layer {layer}: {model.name} has the layers 0 to {model.depth - 1}")
    return tuple(dict.fromkeys(layer % model.depth for layer in asked))


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


def _parser() -> argparse.ArgumentParser:
    server = argparse.ArgumentParser(add_help=False)
    group = server.add_argument_group("server")
    group.add_argument(
        "--target",
        default=os.environ.get("DINOV3_TARGET", DEFAULT_TARGET),
        metavar="HOST:PORT",
        help="environment: DINOV3_TARGET; now %(default)s",
    )
    group.add_argument(
        "--deadline",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="of one call, with all that it waits for a busy or absent server (default %(default)g)",
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with the server's token; or environment: DINOV3_TOKEN"
    )
    group.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="PEM file that vouches for the server; without it, plain text"
    )
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG, PNG, WebP, BMP or TIFF file")
    images.add_argument("--exif", action="store_true", help="turn images by their EXIF orientation first")

    parser = argparse.ArgumentParser(prog="dinov3-client", description="DINOv3 features from a dinov3-serving server.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", parents=[server], help="what the server serves, and its limits")
    info.set_defaults(command=_info)

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
    _add_size(extract, None, "the preset's")
    extract.add_argument(
        "--outputs",
        type=_outputs,
        default=("cls", "patches"),
        metavar="KIND,...",
        help="cls, patches, registers; default: cls,patches",
    )
    extract.add_argument(
        "--layers",
        type=_numbers,
        default=(),
        metavar="I,...",
        help="layers whose outputs come as well; negative ones count from the end (--layers=-4,-1)",
    )
    extract.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="default: %(default)s; npz has no bfloat16"
    )
    extract.set_defaults(command=_extract)

    pca = commands.add_parser(
        "pca",
        parents=[images, server],
        help="a picture of patch features as colours",
        description="Draws each image beside its patch features: the first three principal components, of all images "
        "together, as red, green and blue.",
    )
    pca.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="pca.png for one")
    _add_size(pca, (PCA_SIDE, PCA_SIDE), str(PCA_SIDE))
    pca.add_argument(
        "--layer",
        type=int,
        metavar="I",
        help="show the patches of this layer and not the last one's; a ConvNeXt's earlier ones have finer grids",
    )
    pca.set_defaults(command=_pca_picture)
    return parser


def _add_size(parser: argparse.ArgumentParser, default: tuple[int, int] | None, named: str) -> None:
    parser.add_argument(
        "--size",
        type=_size,
        default=default,
        metavar="N|HxW",
        help=f"pixels of the model's input, multiples of its patch size; default: {named}",
    )


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) < 2**32 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 512 and 384x512 (height x width) are")
    return int(sides[0]), int(sides[-1])


def _outputs(text: str) -> tuple[TokenKind, ...]:
    kinds = [kind for kind in get_args(TokenKind) if kind in text.split(",")]
    unknown = [name for name in text.split(",") if name not in kinds]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no output; cls, patches and registers are")
    return tuple(kinds)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers; 3,7,-1 is one") from None


def _seconds(text: str) -> float:
    try:
        return check_deadline(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds") from None


def _each(values: Sequence[int]) -> str:
    """Of all layers: 384, or 96/192/384/768 where they differ."""
    return "/".join(map(str, dict.fromkeys(values)))


def _rounded(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _complain(text: str) -> None:
    sys.stderr.write(f"dinov3-client: {text}\n")
