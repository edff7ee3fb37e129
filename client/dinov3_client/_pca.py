"""Patch features as colours: the first three principal components as red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dinov3_client._dtypes import Array

# The range of each component that the colours span, in percent of all patches: outliers do not dim the rest.
LOW, HIGH = 1.0, 99.0
# Of the features' root mean square: a component that spans less is rounding noise, not a difference to show.
NOISE = 1e-5


def principal_components(tokens: Array, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean [D] and the first `count` principal components [count, D] of `tokens` [T, D].

    Components are of unit length, by falling variance, from the SVD of the D x D covariance (its size does not grow
    with the number of images). Each has its entry of largest magnitude positive, so that a repetition gives the same
    signs.
    """
    tokens = np.asarray(tokens, np.float64)
    mean = tokens.mean(axis=0)
    centred = tokens - mean
    _, _, directions = np.linalg.svd(centred.T @ centred, hermitian=True)
    components = directions[:count]
    largest = np.abs(components).argmax(axis=1)
    return mean, components * np.sign(components[np.arange(len(components)), largest])[:, None]


def colours(images: Sequence[Array]) -> list[NDArray[np.uint8]]:
    """The patches [P, D] of each image as RGB [P, 3], P of their own each. All images share one basis and one scale."""
    tokens = np.concatenate([np.asarray(patches, np.float64) for patches in images])
    mean, components = principal_components(tokens, 3)
    projected = (tokens - mean) @ components.T
    low, high = np.percentile(projected, [LOW, HIGH], axis=0)
    span = high - low
    shown = span > NOISE * np.sqrt(np.mean(tokens**2))
    scaled = np.where(shown, (projected - low) / np.where(shown, span, 1.0), 0.5)
    rgb = np.round(scaled.clip(0, 1) * 255).astype(np.uint8)
    return np.split(rgb, np.cumsum([len(patches) for patches in images])[:-1])
