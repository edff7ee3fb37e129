"""The basis and the colours of `dinov3-client pca`."""

from __future__ import annotations

import numpy as np

from dinov3_client._pca import HIGH, LOW, colours, principal_components

RNG = np.random.default_rng(3)


def test_components_are_those_that_were_put_in() -> None:
    basis, _ = np.linalg.qr(RNG.normal(size=(32, 32)))
    scales = np.array([9.0, 5.0, 3.0] + [0.1] * 29)
    tokens = (RNG.normal(size=(20_000, 32)) * scales) @ basis.T + 7.0
    mean, components = principal_components(tokens.astype(np.float32), 3)
    assert np.allclose(mean, tokens.mean(0), atol=1e-3)
    assert np.allclose(components @ components.T, np.eye(3), atol=1e-9)
    assert (np.abs(np.sum(components * basis.T[:3], axis=1)) > 0.999).all()


def test_signs_do_not_depend_on_the_order_or_half_of_the_tokens() -> None:
    tokens = RNG.normal(size=(500, 16)) * np.linspace(4, 1, 16)
    _, components = principal_components(tokens, 3)
    _, again = principal_components(tokens[::-1], 3)
    assert np.allclose(components, again, atol=1e-6)
    assert (np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1) > 0).all()


def test_all_images_share_one_basis_and_one_scale() -> None:
    first, second = RNG.normal(size=(100, 24)), RNG.normal(size=(50, 24)) + 1.0
    alone = colours([np.concatenate([first, second])])
    apart = colours([first.astype(np.float64), second])
    assert [len(each) for each in apart] == [100, 50]
    assert np.array_equal(np.concatenate(apart), alone[0])


def test_colours_span_the_whole_range_but_for_outliers() -> None:
    tokens = RNG.normal(size=(10_000, 24))
    tokens[0] *= 1000  # an outlier takes no range from the others
    [rgb] = colours([tokens])
    assert rgb.dtype == np.uint8
    assert rgb.shape == (10_000, 3)
    for component in rgb.T:
        assert component.min() == 0
        assert component.max() == 255
        assert 0.005 < np.mean(component == 255) < 0.03
    assert (LOW, HIGH) == (1.0, 99.0)


def test_nothing_to_tell_apart_is_gray() -> None:
    """Rounding noise is not stretched to colours."""
    flat = np.full((64, 24), 0.1, np.float32) * np.linspace(-3, 3, 24, dtype=np.float32)
    assert (colours([flat, flat])[0] == 128).all()
    two = np.repeat([[1.0] * 24, [2.0] * 24], 32, axis=0)  # one dimension: one colour channel
    [rgb] = colours([two])
    assert sorted(channel.std() > 0 for channel in rgb.T) == [False, False, True]
