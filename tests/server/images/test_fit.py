"""Fitting: the size to which a picture is resized, and its pixels, in Pillow's terms and by torchvision's own code."""

from __future__ import annotations

import importlib
import os
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dinov3_server.images.cost import PLAIN_PIXELS, Cost, transform_cost
from dinov3_server.images.preprocess import transform_into, transform_pixels_into
from dinov3_serving.images import Box, Color, Fit, Transform
from dinov3_serving.presets import Interpolation
from tests.server.images.files import photo

CROP, PAD = Fit("crop"), Fit("pad", Color(10, 200, 90))
Size = tuple[int, int]


@pytest.mark.parametrize(
    ("fit", "picture", "size", "resized"),
    [
        (CROP, (480, 640), (256, 256), (256, 341)),  # int(256 * 640 / 480), as Resize(256)
        (CROP, (640, 480), (256, 256), (341, 256)),
        (CROP, (100, 100), (256, 256), (256, 256)),
        (CROP, (480, 640), (384, 512), (384, 512)),
        (CROP, (482, 640), (384, 512), (385, 512)),  # the width decides
        (CROP, (100, 1000), (224, 96), (224, 2240)),
        (CROP, (1000, 100), (96, 224), (2240, 224)),
        (Fit("crop", resize_shorter=256), (480, 640), (224, 224), (256, 341)),
        (Fit("crop", resize_shorter=256), (640, 480), (224, 224), (341, 256)),
        (Fit("crop", resize_shorter=256), (333, 333), (224, 256), (256, 256)),
        (PAD, (480, 640), (256, 256), (192, 256)),
        (PAD, (640, 480), (256, 256), (256, 192)),
        (PAD, (333, 500), (224, 224), (149, 224)),  # int(224 * 333 / 500)
        (PAD, (333, 500), (512, 224), (149, 224)),
        (PAD, (10, 20_000), (224, 224), (1, 224)),  # at least one pixel
        (Fit(), (480, 640), (256, 256), (256, 256)),
    ],
)
def test_the_size_before_cropping_or_padding(fit: Fit, picture: Size, size: Size, resized: Size) -> None:
    assert fit.resized(picture, size) == resized


def test_a_crop_is_covered_and_a_padded_picture_fits() -> None:
    draws = random.Random(5)
    for _ in range(20_000):
        picture = draws.randint(1, 5000), draws.randint(1, 5000)
        size = 16 * draws.randint(1, 60), 16 * draws.randint(1, 60)
        height, width = CROP.resized(picture, size)
        assert min(height - size[0], width - size[1]) == 0
        height, width = PAD.resized(picture, size)
        assert max(height - size[0], width - size[1]) == 0
        assert min(height, width) > 0


def fitted(
    pixels: npt.NDArray[np.uint8], size: Size, fit: Fit, filter: Interpolation = "bicubic", crop: Box | None = None
) -> npt.NDArray[np.uint8]:
    """Return [H, W, 3]: of a file and of raw pixels, which are the same."""
    transform = Transform(size, filter, crop, fit=fit)
    outs = bytearray(size[0] * size[1] * 3), bytearray(size[0] * size[1] * 3)
    transform_into(Image.fromarray(pixels), transform, memoryview(outs[0]))
    transform_pixels_into(pixels, transform, memoryview(outs[1]))
    assert outs[0] == outs[1]
    return np.frombuffer(outs[0], np.uint8).reshape(*size, 3)


@pytest.mark.parametrize("picture", [(61, 90), (90, 61), (40, 61), (7, 9), (33, 400)])
def test_crop_in_pillows_terms(picture: Size) -> None:
    height, width = picture
    pixels = photo(height, width)
    across, down = (int(32 * width / height), 32) if height <= width else (32, int(32 * height / width))
    image = Image.fromarray(pixels).resize((across, down), Image.Resampling.BICUBIC)
    left, top = round((across - 32) / 2), round((down - 32) / 2)
    expected = np.asarray(image.crop((left, top, left + 32, top + 32)))
    np.testing.assert_array_equal(fitted(pixels, (32, 32), CROP), expected)


@pytest.mark.parametrize("slack", range(6))
def test_the_center_is_rounded_as_torchvision_does(slack: int) -> None:
    """Halves to even, so that of 1, 3 and 5 columns too many 0, 2 and 2 are at the left."""
    pixels = photo(32, 32 + slack)
    left = (0, 0, 1, 2, 2, 2)[slack]
    np.testing.assert_array_equal(fitted(pixels, (32, 32), CROP), pixels[:, left : left + 32])
    rows = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    np.testing.assert_array_equal(fitted(rows, (32, 32), CROP), rows[left : left + 32])


@pytest.mark.parametrize("width", range(20, 33))
def test_borders(width: int) -> None:
    pixels = photo(32, width)
    found = fitted(pixels, (32, 32), PAD)
    left = (32 - width) // 2
    np.testing.assert_array_equal(found[:, left : left + width], pixels)
    border = np.concatenate([found[:, :left], found[:, left + width :]], 1)
    assert (border == [10, 200, 90]).all()
    np.testing.assert_array_equal(fitted(pixels, (32, 48), Fit("pad"))[:, (48 - width) // 2 :][:, :width], pixels)


def test_the_box_of_a_view_is_fitted_and_then_flipped() -> None:
    pixels, box = photo(61, 90), Box(10, 20, 30, 50)
    cut = np.ascontiguousarray(pixels[10:40, 20:70])
    for fit in (CROP, PAD, Fit("crop", resize_shorter=40)):
        expected = fitted(cut, (32, 32), fit)
        np.testing.assert_array_equal(fitted(pixels, (32, 32), fit, crop=box), expected)
        out = bytearray(32 * 32 * 3)
        transform_into(Image.fromarray(pixels), Transform((32, 32), "bicubic", box, True, fit), memoryview(out))
        np.testing.assert_array_equal(np.frombuffer(out, np.uint8).reshape(32, 32, 3), expected[:, ::-1])


def test_a_picture_of_the_right_size_is_not_changed_unless_it_is_to_be_enlarged() -> None:
    pixels = photo(32, 48)
    for fit in (CROP, PAD, Fit("crop", resize_shorter=0)):
        assert not Transform((32, 48), "bicubic", fit=fit).changes_size(32, 48)
        np.testing.assert_array_equal(fitted(pixels, (32, 48), fit), pixels)
    larger = Fit("crop", resize_shorter=64)
    assert Transform((32, 48), "bicubic", fit=larger).changes_size(32, 48)
    assert (fitted(pixels, (32, 48), larger) != pixels).any()


def test_elongated_pictures_cost_what_they_are_resized_to() -> None:
    """The center of a line of 100 x 200,000 pixels is cropped from 256 x 512,000."""
    cost = transform_cost(100, 200_000, [Transform((256, 256), "bilinear", fit=CROP)])
    assert not cost.plain
    assert cost.nbytes > 4 * 256 * 512_000
    assert transform_cost(100, 200_000, [Transform((256, 256), "bilinear", fit=PAD)]).nbytes < 100_000_000
    assert transform_cost(2048, PLAIN_PIXELS // 2048, [Transform((256, 256), "bilinear", fit=CROP)]).plain
    assert Cost(0, 0, 9, False).with_transforms([Transform((256, 256), "bilinear", fit=CROP)]).nbytes > 9


SOURCE = "TORCHVISION_SOURCE"


@pytest.fixture(scope="module")
def functional() -> Any:
    """torchvision's transforms/functional.py, without the rest of torchvision."""
    folder = Path(os.environ[SOURCE]) / "torchvision" / "transforms"
    alone, utils, transforms = (types.ModuleType(name) for name in ("tv", "tv.utils", "tv.transforms"))
    vars(utils).update(_log_api_usage_once=lambda _: None, _Image_fromarray=Image.fromarray)
    alone.__path__, transforms.__path__ = [], [str(folder)]
    sys.modules.update({module.__name__: module for module in (alone, utils, transforms)})
    yield importlib.import_module("tv.transforms.functional")
    for name in [name for name in sys.modules if name == "tv" or name.startswith("tv.")]:
        del sys.modules[name]


def resize_and_center_crop(tv: Any, image: Image.Image, size: Size, fit: Fit, how: Any) -> Image.Image:
    """Return what Resize and CenterCrop make of a PIL image, for a square, or with a size of the shorter side."""
    shorter = fit.resize_shorter or size[0]
    resized: Image.Image = tv.resize(image, [shorter], how)
    cropped: Image.Image = tv.center_crop(resized, list(size))
    return cropped


def resize_and_pad(tv: Any, image: Image.Image, size: Size, fit: Fit, how: Any) -> Image.Image:
    """Return what v2.Resize(None, max_size=S) and Pad make of a PIL image, for a square."""
    height, width = tv._compute_resized_output_size(
        (image.height, image.width), None, max_size=size[0], allow_size_none=True
    )
    resized: Image.Image = tv.resize(image, [max(1, height), max(1, width)], how)
    across, down = size[1] - resized.width, size[0] - resized.height
    borders = [across // 2, down // 2, (across + 1) // 2, (down + 1) // 2]  # those of center_crop
    padded: Image.Image = tv.pad(resized, borders, fill=tuple(fit.pad_color))
    return padded


@pytest.mark.upstream
@pytest.mark.skipif(SOURCE not in os.environ, reason=f"{SOURCE} names no folder with torchvision's source")
@pytest.mark.parametrize("reference", [resize_and_center_crop, resize_and_pad])
def test_pixels_equal_those_of_torchvision(functional: Any, reference: Callable[..., Image.Image]) -> None:
    draws = random.Random(1)
    filters: dict[Interpolation, Any] = {
        name: functional.InterpolationMode(name) for name in ("nearest", "bilinear", "bicubic", "lanczos")
    }
    for trial in range(300):
        pixels = photo(draws.randint(1, 400), draws.randint(1, 400))
        size = (16 * draws.randint(1, 20),) * 2
        fit = PAD
        if reference is resize_and_center_crop:
            fit = draws.choice([CROP, Fit("crop", resize_shorter=size[0] + draws.randint(0, 40))])
            if fit.resize_shorter:
                size = size[0], 16 * draws.randint(1, size[0] // 16)
        filter = draws.choice(list(filters))
        expected = np.asarray(reference(functional, Image.fromarray(pixels), size, fit, filters[filter]))
        np.testing.assert_array_equal(fitted(pixels, size, fit, filter), expected, err_msg=f"trial {trial}")
