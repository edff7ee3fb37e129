"""Views: crop, then resize, then flip, bit-equal to Pillow's own calls at the client."""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinov3_server.errors import InvalidInput
from dinov3_server.images.preprocess import transform_into, transform_pixels_into
from dinov3_serving.images import Box, Transform, check_box
from dinov3_serving.presets import Interpolation
from tests.server.images.files import photo

HEIGHT, WIDTH = 61, 90
PHOTO = photo(HEIGHT, WIDTH)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    top, left = draw(st.integers(0, HEIGHT - 1)), draw(st.integers(0, WIDTH - 1))
    return Box(top, left, draw(st.integers(1, HEIGHT - top)), draw(st.integers(1, WIDTH - left)))


def pixels_of(source: Image.Image | npt.NDArray[np.uint8], how: Transform) -> npt.NDArray[np.uint8]:
    """Return [H, W, 3], written into the middle of a buffer whose rest must not change."""
    size = how.size or (how.crop[2:] if how.crop else (HEIGHT, WIDTH))
    buffer = bytearray(b"\xa5" * (7 + size[0] * size[1] * 3 + 5))
    out = memoryview(buffer)[7:-5]
    if isinstance(source, np.ndarray):
        transform_pixels_into(source, how, out)
    else:
        transform_into(source, how, out)
    assert buffer[:7] + buffer[-5:] == b"\xa5" * 12
    return np.frombuffer(out, np.uint8).reshape(*size, 3)


@settings(max_examples=200, deadline=None)
@given(
    st.none() | boxes(),
    st.none() | st.tuples(st.sampled_from([16, 32, 48, 96]), st.sampled_from([16, 32, 48, 96])),
    st.booleans(),
    st.sampled_from(sorted(RESAMPLING)),
)
def test_views_equal_pillow_at_the_client(
    crop: Box | None, size: tuple[int, int] | None, flip: bool, interpolation: Interpolation
) -> None:
    image = Image.fromarray(PHOTO)
    expected = image
    if crop:
        expected = expected.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    if size:
        expected = expected.resize((size[1], size[0]), RESAMPLING[interpolation])
    if flip:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    how = Transform(size, interpolation, crop, flip)
    np.testing.assert_array_equal(pixels_of(image, how), np.asarray(expected))
    np.testing.assert_array_equal(pixels_of(PHOTO, how), np.asarray(expected))


def test_pixels_outside_the_box_do_not_matter() -> None:
    """`resize(box=...)` would fail this: its filter reaches beyond the borders of the box."""
    box, size = Box(10, 20, 30, 40), (48, 64)
    ours = pixels_of(Image.fromarray(PHOTO), Transform(size, "bilinear", box))
    other = PHOTO.copy()
    inside = np.zeros(PHOTO.shape[:2], bool)
    inside[10:40, 20:60] = True
    other[~inside] = 255 - other[~inside]
    np.testing.assert_array_equal(pixels_of(Image.fromarray(other), Transform(size, "bilinear", box)), ours)
    np.testing.assert_array_equal(pixels_of(other, Transform(size, "bilinear", box)), ours)

    at_once = Image.fromarray(PHOTO).resize((64, 48), Image.Resampling.BILINEAR, box=(20, 10, 60, 40))
    assert (np.asarray(at_once) != ours).any()


def test_the_flip_comes_last() -> None:
    """In another order, resizing the mirrored image rounds differently, and cropping it gives another part."""
    how = Transform((16, 48), "bicubic", Box(3, 5, 50, 41), flip=True)
    not_flipped = pixels_of(PHOTO, Transform((16, 48), "bicubic", Box(3, 5, 50, 41)))
    np.testing.assert_array_equal(pixels_of(PHOTO, how), not_flipped[:, ::-1])
    assert (
        pixels_of(np.ascontiguousarray(PHOTO[:, ::-1]), Transform((16, 48), "bicubic", how.crop))
        != pixels_of(PHOTO, how)
    ).any()


def random_resized_crop_params(
    height: int, width: int, draws: random.Random, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a box like RandomResizedCrop.get_params of torchvision (transforms/transforms.py), for its default ratio."""
    while True:
        area = height * width * draws.uniform(*scale)
        ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draws.randint(0, height - h), draws.randint(0, width - w), h, w


@pytest.mark.parametrize(("size", "scale"), [(48, (0.32, 1.0)), (16, (0.05, 0.32))])
def test_a_view_is_random_resized_crop_and_flip_of_torchvision(size: int, scale: tuple[float, float]) -> None:
    """On PIL images these are, in torchvision's transforms/_functional_pil.py: crop is
    `img.crop((left, top, left + width, top + height))`, resize is `img.resize(size[::-1], interpolation)` (with
    whatever antialias), hflip is `img.transpose(FLIP_LEFT_RIGHT)`; functional.resized_crop is the first two."""
    draws = random.Random(size)
    image = Image.fromarray(PHOTO)
    for _ in range(50):
        i, j, h, w = random_resized_crop_params(HEIGHT, WIDTH, draws, scale)
        flip = draws.random() < 0.5
        theirs = image.crop((j, i, j + w, i + h)).resize((size, size), Image.Resampling.BICUBIC)
        theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else theirs
        how = Transform((size, size), "bicubic", Box(i, j, h, w), flip)
        np.testing.assert_array_equal(pixels_of(image, how), np.asarray(theirs))
        np.testing.assert_array_equal(pixels_of(PHOTO, how), np.asarray(theirs))


@pytest.mark.parametrize(
    "how", [Transform(None, "bilinear", Box(1, 2, 16, 32)), Transform((16, 32), "bilinear", Box(1, 2, 16, 32), True)]
)
def test_pixels_that_need_no_resizing_are_only_copied(how: Transform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov3_server.images.preprocess.transform_into", pytest.fail)
    assert not how.changes_size(HEIGHT, WIDTH)
    cropped = PHOTO[1:17, 2:34]
    np.testing.assert_array_equal(pixels_of(PHOTO, how), cropped[:, ::-1] if how.flip else cropped)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        (Box(0, 0, 61, 90), None),
        (Box(60, 89, 1, 1), None),
        (Box(0, 0, 0, 5), "height 0, width 5 has no pixels"),
        (Box(0, 0, 5, 0), "height 5, width 0 has no pixels"),
        (
            Box(2, 0, 60, 90),
            "top 2, left 0, height 60, width 90 reaches beyond the picture, which is 61x90 (height x width): top + "
            "height is 62, allowed are up to 61",
        ),
        (Box(0, 89, 1, 2), "left + width is 91, allowed are up to 90"),
        (Box(61, 90, 1, 1), "is 62, allowed are up to 61 and left + width is 91"),
        (Box(2**32 - 1, 0, 2**32 - 1, 1), "top + height is 8589934590"),
    ],
)
def test_boxes_outside_the_image_are_refused(box: Box, reason: str | None) -> None:
    if reason is None:
        check_box(box, (61, 90), "images[0].views[0].crop")
        return
    with pytest.raises(InvalidInput) as error:
        check_box(box, (61, 90), "images[0].views[0].crop")
    assert reason in str(error.value)
    assert error.value.field == "images[0].views[0].crop"


def test_a_box_in_an_image_of_unknown_size() -> None:
    check_box(Box(10**6, 10**6, 1, 1), None, "")
    with pytest.raises(InvalidInput, match="no pixels"):
        check_box(Box(0, 0, 0, 1), None, "")
