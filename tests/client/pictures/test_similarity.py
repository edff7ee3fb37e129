"""Points, patches, cosines, and the colors and numbers that show them."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from dinov3_client._pictures.colormap import magma, ticks
from dinov3_client._pictures.similarity import cosines, patch_at, read_point


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("0,0", (0.005, 0.0025)),
        ("99, 199", (0.995, 0.9975)),
        ("1,1", (0.015, 0.0075)),  # a pixel, and not the lower right corner
        ("1.0,1.", (1.0, 1.0)),
        ("0.5,.3", (0.5, 0.3)),
    ],
)
def test_whole_numbers_are_pixels_and_others_fractions(text: str, place: tuple[float, float]) -> None:
    assert read_point(text).within(100, 200) == pytest.approx(place)


@pytest.mark.parametrize("text", ["", "3", "3,4,5", "1,0.5", "a,b", "0.5;0.5", "1e1,2", "nan,nan", "0.5,"])
def test_invalid_points_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not a point, such as 320,200 .pixels. or 0.5,0.3 .fractions of width and height."
    ):
        read_point(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("100,0", "of 100 x 200 pixels, X is 0 to 99 and Y is 0 to 199"),
        ("0,200", "X is 0 to 99"),
        ("-1,0", "X is 0 to 99"),
        ("1.01,0.0", "fractions are 0.0 to 1.0"),
        ("0.5,-0.1", "fractions are 0.0 to 1.0"),
        ("50.0,70.0", "pixels are whole numbers"),
    ],
)
def test_a_point_outside_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_point(text).within(100, 200)


def test_the_patch_is_the_one_that_the_point_lies_in() -> None:
    grid = (3, 5)
    for x in range(50):
        for y in range(60):
            assert patch_at(read_point(f"{x},{y}").within(50, 60), grid) == (y // 20, x // 10)
    assert patch_at((0.0, 0.0), grid) == (0, 0)
    assert patch_at((1.0, 1.0), grid) == (2, 4)
    assert patch_at((0.2, 0.0), grid) == (0, 1)


def test_cosines() -> None:
    tokens = np.array([[3, 4, 0], [-3, -4, 0], [0, 0, 2], [30, 40, 0], [0, 0, 0], [4, 3, 0]], np.float16)
    assert cosines(tokens[0], tokens) == pytest.approx([1, -1, 0, 1, 0, 0.96])
    assert np.array_equal(cosines(tokens[4], tokens), np.zeros(6))
    large = np.full((1, 64), 60_000, np.float16)  # of which the sum of squares is infinite in float16
    assert cosines(large[0], large) == pytest.approx([1])


def test_colors_are_those_of_matplotlib() -> None:
    expected = np.array(matplotlib.colormaps["magma"].colors) * 255  # type: ignore[attr-defined]
    assert np.abs(magma(np.linspace(0, 1, 256)) - expected).max() < 3
    assert magma(np.array([[-1.0, 0.0], [1.0, 2.0]])).tolist() == [[[0, 0, 4]] * 2, [[252, 253, 191]] * 2]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.786, 1.0, [-0.8, -0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-1.0, 1.0, [-1, -0.8, -0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 1.0, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (0.97, 1.0, [0.97, 0.975, 0.98, 0.985, 0.99, 0.995, 1.0]),
        (0.999, 1.0, [0.999, 0.9992, 0.9994, 0.9996, 0.9998, 1.0]),
    ],
)
def test_ticks_are_round_numbers_around_the_range(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected
