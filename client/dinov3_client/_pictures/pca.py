"""Principal components of tokens that come in parts, and the colours that three of them make of patch features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinov3_client._dtypes import Array

Floats = NDArray[np.float64]

# The range of each component that the colours span, in percent of all patches: outliers do not dim the rest.
LOW, HIGH = 1.0, 99.0
# Of the features' root mean square: a component that spans less is rounding noise, not a difference to show.
NOISE = 1e-5


@dataclass(frozen=True)
class Components:
    """Of D channels, K principal components, by falling variance."""

    mean: Floats
    """[D]"""
    directions: Floats
    """[K, D], orthonormal. The largest entry (by magnitude) of each is positive, for equal signs in a repetition."""
    variances: Floats
    """[K], of the tokens along each."""
    total_variance: float
    """Along all D."""

    def project(self, tokens: Array) -> Floats:
        """[T, D] to [T, K]."""
        projected: Floats = (np.asarray(tokens, np.float64) - self.mean) @ self.directions.T
        return projected


class Moments:
    """The mean and the scatter of tokens of D channels. Memory is D x D, however many tokens there are.

    Parts are joined as Chan, Golub and LeVeque have it (Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances, 1979), in float64: each is centred before it is squared, so that a large mean costs no digits.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean: Floats = np.zeros(channels)
        self._scatter: Floats = np.zeros((channels, channels))

    def add(self, tokens: Array) -> None:
        """[T, D]"""
        tokens = np.asarray(tokens, np.float64)
        if not len(tokens):
            return
        mean = tokens.mean(axis=0)
        centred = tokens - mean
        away = mean - self.mean
        both = self.count + len(tokens)
        self._scatter += centred.T @ centred
        self._scatter += np.outer(away, away * (self.count * len(tokens) / both))
        self.mean = self.mean + away * (len(tokens) / both)
        self.count = both

    @property
    def root_mean_square(self) -> float:
        """Of all values of all tokens."""
        squares = np.trace(self._scatter) / self.count + self.mean @ self.mean
        return float(np.sqrt(squares / len(self.mean)))

    def components(self, count: int) -> Components:
        """The first `count` of them, from the eigenvectors of the covariance."""
        covariance = self._scatter / self.count
        variances, vectors = np.linalg.eigh(covariance)  # by rising variance
        directions = vectors.T[::-1][:count]
        largest = np.abs(directions).argmax(axis=1)
        signs = np.sign(directions[np.arange(len(directions)), largest])
        return Components(
            self.mean, directions * signs[:, None], variances[::-1][:count].clip(0), float(np.trace(covariance))
        )


class Palette:
    """Tokens as RGB: their first three components, each from its 1st to its 99th percentile.

    sample: tokens [T, 3] already projected, of all that are to be coloured, that the percentiles are taken of.
    noise: components that span less are shown as gray.
    """

    def __init__(self, components: Components, sample: Floats, noise: float) -> None:
        self._components = components
        self._low, high = np.percentile(sample, [LOW, HIGH], axis=0)
        span = high - self._low
        self._shown = span > noise
        self._span = np.where(self._shown, span, 1.0)

    def __call__(self, tokens: Array) -> NDArray[np.uint8]:
        """[T, D] to [T, 3]."""
        scaled = (self._components.project(tokens) - self._low) / self._span
        return np.round(np.where(self._shown, scaled, 0.5).clip(0, 1) * 255).astype(np.uint8)
