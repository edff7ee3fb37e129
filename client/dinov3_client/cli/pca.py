"""`dinov3-client pca`."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from dinov3_client import _files, _pca, _picture
from dinov3_client._errors import Dinov3Error
from dinov3_client._files import Options
from dinov3_client.cli.common import Failures, UsageError, add_size, connect, known_model, layer_numbers, say

# A finer grid than the preset's 16 x 16: 32 x 32 patches show shapes.
PCA_SIDE = 512


def add(commands: Any, server: argparse.ArgumentParser, images: argparse.ArgumentParser) -> None:
    pca = commands.add_parser(
        "pca",
        parents=[images, server],
        help="a picture of patch features as colours",
        description="Draws each image beside its patch features: the first three principal components, of all images "
        "together, as red, green and blue.",
    )
    pca.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="pca.png for one")
    add_size(pca, (PCA_SIDE, PCA_SIDE), str(PCA_SIDE))
    pca.add_argument(
        "--layer",
        type=int,
        metavar="I",
        help="show the patches of this layer and not the last one's; a ConvNeXt's earlier ones have finer grids",
    )
    pca.set_defaults(command=_pca_picture)


def _pca_picture(args: argparse.Namespace) -> int:
    image_format = Image.registered_extensions().get(args.output.suffix.lower())
    if image_format not in Image.SAVE:
        raise UsageError(f"-o {args.output}: its ending names no image format to write; .png does")
    if not args.output.parent.is_dir():
        raise UsageError(f"-o {args.output}: there is no folder {args.output.parent}")
    # The server has its own limit (`max_image_pixels`): what passed that is no bomb, whatever Pillow thinks.
    Image.MAX_IMAGE_PIXELS = None
    with connect(args) as client:
        model = known_model(client)
        layers = () if args.layer is None else layer_numbers((args.layer,), model)
        options = Options(("patches",), "dinov3", args.size, "float16", layers, args.exif)
        failures = Failures()
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
    say(f"{args.output}: {len(photos)} of {len(args.images)} images, {picture.width}x{picture.height}")
    return 1 if failures.count else 0
