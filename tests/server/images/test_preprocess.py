"""Presets, size rules, and the pixels written."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import PIL
import pytest
from PIL import Image

from dinov3_server.errors import InvalidInput
from dinov3_server.images import preprocess
from dinov3_server.images.preprocess import PRESETS, transform_into, transform_pixels_into
from dinov3_serving.images import Transform, check_size
from tests.server.images.files import photo


def test_presets() -> None:
    assert dict(PRESETS) == {
        "dinov3": Transform((256, 256), "bilinear"),
        "hf": Transform((224, 224), "bilinear"),
        "none": Transform(None, "bilinear"),
    }


@pytest.mark.parametrize("size", [(16, 16), (256, 256), (224, 224), (384, 512), (16, 1600)])
def test_allowed_sizes(size: tuple[int, int]) -> None:
    check_size(*size, patch=16, field="preprocessing.size")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((250, 256), ["of 250x256 (height x width), height 250 is not (nearest: 240 or 256)"]),
        ((256, 100), ["width 100 is not (nearest: 96 or 112)"]),
        ((500, 333), ["height 500 is not (nearest: 496 or 512) and width 333 is not (nearest: 320 or 336)"]),
        ((1, 1), ["height 1 is not (nearest: 16) and width 1 is not (nearest: 16)"]),
        ((0, 256), ["height 0 is not (nearest: 16)"]),
        ((256, -16), ["width -16 is not (nearest: 16)"]),
        ((518, 518), ["height 518 is not (nearest: 512 or 528)", "Patches of 14 pixels", "518, are DINOv2's"]),
        ((224, 98), ["width 98 is not (nearest: 96 or 112)", "Patches of 14 pixels"]),
    ],
)
def test_unsupported_sizes_are_refused_with_the_nearest(size: tuple[int, int], reason: list[str]) -> None:
    with pytest.raises(InvalidInput) as error:
        check_size(*size, patch=16, field="preprocessing.size")
    message = str(error.value)
    assert message.startswith("the model takes heights and widths that are positive multiples of its patch size, 16")
    for part in reason:
        assert part in message
    assert ("DINOv2" in message) == any("14" in part for part in reason)
    assert error.value.field == "preprocessing.size"


def test_the_identity_names_what_determines_the_pixels() -> None:
    assert preprocess.PREPROCESSING_ID.startswith(f"pillow-{PIL.__version__}/libjpeg-turbo-")
    assert preprocess.PREPROCESSING_ID.endswith("/1")
    assert "None" not in preprocess.PREPROCESSING_ID


BEFORE, AFTER = 5, 9


def into(
    height: int, width: int, image: Image.Image | npt.NDArray[np.uint8], transform: Transform
) -> npt.NDArray[np.uint8]:
    """Return [height, width, 3], written into the middle of a buffer whose rest must not change."""
    buffer = bytearray(b"\xa5" * (BEFORE + height * width * 3 + AFTER))
    out = memoryview(buffer)[BEFORE:-AFTER]
    if isinstance(image, np.ndarray):
        transform_pixels_into(image, transform, out)
    else:
        transform_into(image, transform, out)
    assert buffer[:BEFORE] == b"\xa5" * BEFORE
    assert buffer[-AFTER:] == b"\xa5" * AFTER
    return np.frombuffer(out, np.uint8).reshape(height, width, 3)


@pytest.mark.parametrize("size", [None, (32, 48)])
def test_pixels_of_the_right_size_are_untouched(size: tuple[int, int] | None) -> None:
    pixels = photo(32, 48)
    transform = Transform(size, "bicubic")
    np.testing.assert_array_equal(into(32, 48, Image.fromarray(pixels), transform), pixels)
    np.testing.assert_array_equal(into(32, 48, pixels, transform), pixels)


@pytest.mark.parametrize(
    ("name", "resampling"),
    [
        ("nearest", Image.Resampling.NEAREST),
        ("bilinear", Image.Resampling.BILINEAR),
        ("bicubic", Image.Resampling.BICUBIC),
        ("lanczos", Image.Resampling.LANCZOS),
    ],
)
def test_resampling_is_pillows_for_files_and_for_raw_pixels(name: str, resampling: Image.Resampling) -> None:
    pixels = photo(61, 90)
    transform = Transform((32, 48), name)
    expected = np.asarray(Image.fromarray(pixels).resize((48, 32), resampling))
    np.testing.assert_array_equal(into(32, 48, Image.fromarray(pixels), transform), expected)
    np.testing.assert_array_equal(into(32, 48, pixels, transform), expected)


def test_height_and_width_are_not_swapped() -> None:
    pixels = photo(32, 48)
    transform = Transform((48, 32), "bilinear")
    expected = np.asarray(Image.fromarray(pixels).resize((32, 48), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(into(48, 32, Image.fromarray(pixels), transform), expected)
    np.testing.assert_array_equal(into(48, 32, pixels, transform), expected)


def test_one_pixel_can_be_resized() -> None:
    image = Image.new("RGB", (1, 1), (10, 200, 90))
    assert (into(256, 256, image, PRESETS["dinov3"]) == [10, 200, 90]).all()


@pytest.mark.parametrize("length", [32 * 48 * 3 - 1, 32 * 48 * 3 + 1])
def test_a_buffer_of_another_length_is_refused(length: int) -> None:
    out = bytearray(b"\xa5" * length)
    with pytest.raises(ValueError, match="different structures"):
        transform_into(Image.fromarray(photo(32, 48)), PRESETS["none"], memoryview(out))
    with pytest.raises(ValueError, match="4608 bytes of pixels do not go into"):
        transform_pixels_into(photo(32, 48), PRESETS["none"], memoryview(out))
    assert out == b"\xa5" * length
