"""Principal components of tokens in parts, and their colors."""

from __future__ import annotations

from typing import Any

import numpy as np

from dinov3_client._pictures.pca import HIGH, LOW, NOISE, Components, Moments, Palette

RNG = np.random.default_rng(3)


def input_size_for(count: int, *parts: np.ndarray[Any, Any]) -> Components:
    return moments(*parts).components(count)


def moments(*parts: np.ndarray[Any, Any]) -> Moments:
    found = Moments(parts[0].shape[1])
    for part in parts:
        found.add(part)
    return found


def colors(*parts: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    found = moments(*parts)
    components = found.components(3)
    palette = Palette(components, components.project(np.concatenate(parts)), NOISE * found.root_mean_square)
    return [palette(part) for part in parts]


def test_they_are_those_of_a_singular_value_decomposition_of_all_tokens() -> None:
    tokens = RNG.normal(size=(3000, 24)) @ RNG.normal(size=(24, 24)) + RNG.normal(size=24) * 50
    found = input_size_for(5, tokens[:1], tokens[1:1700], tokens[1700:1700], tokens[1700:])
    mean = tokens.mean(0)
    _, singular, directions = np.linalg.svd(tokens - mean, full_matrices=False)
    assert np.allclose(found.mean, mean, atol=1e-11)
    assert np.allclose(np.abs(np.sum(found.directions * directions[:5], axis=1)), 1, atol=1e-9)
    assert np.allclose(found.variances, singular[:5] ** 2 / 3000)
    assert np.isclose(found.total_variance, np.sum(singular**2) / 3000)
    assert np.allclose(found.project(tokens), (tokens - mean) @ found.directions.T)


def test_a_large_mean_costs_no_digits() -> None:
    small = RNG.normal(size=(2000, 8)) * np.linspace(4, 1, 8)
    far = [part + 1e7 for part in np.split(small, 10)]
    assert np.allclose(input_size_for(3, *far).variances, input_size_for(3, small).variances, rtol=1e-6)


def test_float16_tokens_are_summed_in_float64() -> None:
    tokens = (RNG.normal(size=(5000, 8)) + 100).astype(np.float16)
    assert np.allclose(moments(tokens, tokens).mean, tokens.astype(np.float64).mean(0), rtol=1e-12)


def test_signs_do_not_depend_on_the_order_or_parts_of_the_tokens() -> None:
    tokens = RNG.normal(size=(500, 16)) * np.linspace(4, 1, 16)
    directions = input_size_for(3, tokens).directions
    assert np.allclose(directions, input_size_for(3, *np.split(tokens[::-1], 5)).directions, atol=1e-9)
    assert (np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1) > 0).all()


def test_the_root_mean_square_is_of_all_values() -> None:
    tokens = RNG.normal(size=(300, 16)) + 2
    assert np.isclose(moments(tokens[:100], tokens[100:]).root_mean_square, np.sqrt(np.mean(tokens**2)))


def test_all_images_share_one_basis_and_one_scale() -> None:
    first, second = RNG.normal(size=(100, 24)), RNG.normal(size=(50, 24)) + 1.0
    [together] = colors(np.concatenate([first, second]))
    assert np.array_equal(np.concatenate(colors(first, second)), together)


def test_colors_span_the_whole_range_but_for_outliers() -> None:
    tokens = RNG.normal(size=(10_000, 24))
    tokens[0] *= 1000  # an outlier takes no range from the others
    [rgb] = colors(tokens)
    assert rgb.dtype == np.uint8
    assert rgb.shape == (10_000, 3)
    for component in rgb.T:
        assert component.min() == 0
        assert component.max() == 255
        assert 0.005 < np.mean(component == 255) < 0.03
    assert (LOW, HIGH) == (1.0, 99.0)


def test_nothing_to_tell_apart_is_gray() -> None:
    """Rounding noise is not stretched to colors."""
    flat = np.full((64, 24), 0.1, np.float32) * np.linspace(-3, 3, 24, dtype=np.float32)
    assert (np.concatenate(colors(flat, flat)) == 128).all()
    [rgb] = colors(np.repeat([[1.0] * 24, [2.0] * 24], 32, axis=0))  # one dimension: one color channel
    assert sorted(channel.std() > 0 for channel in rgb.T) == [False, False, True]
