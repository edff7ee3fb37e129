"""Principal components of tokens that arrive in parts, and colors of patch features made of the first three."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinov3_client._dtypes import Array

Floats = NDArray[np.float64]

# Percentiles of each component that the colors span, so that outliers do not dim the rest.
LOW, HIGH = 1.0, 99.0
# As a fraction of the features' root mean square: a component that spans less is rounding noise.
NOISE = 1e-5


@dataclass(frozen=True)
class Components:
    """K principal components of D channels, by falling variance."""

    mean: Floats
    """[D]"""
    directions: Floats
    """[K, D], orthonormal. The entry of largest magnitude of each is positive, so that signs are reproducible."""
    variances: Floats
    """[K], the variance of the tokens along each."""
    total_variance: float
    """Of all D channels."""

    def project(self, tokens: Array) -> Floats:
        """Project tokens [T, D] to [T, K]."""
        projected: Floats = (np.asarray(tokens, np.float64) - self.mean) @ self.directions.T
        return projected


class Moments:
    """Accumulates the mean and the scatter matrix of tokens of D channels, in D x D memory.

    Parts are joined by the method of Chan, Golub and LeVeque (Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances, 1979), in float64: each part is centered before it is squared, so that a large mean costs no
    precision.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean: Floats = np.zeros(channels)
        self._scatter: Floats = np.zeros((channels, channels))

    def add(self, tokens: Array) -> None:
        """Add tokens [T, D]."""
        tokens = np.asarray(tokens, np.float64)
        if not len(tokens):
            return
        mean = tokens.mean(axis=0)
        centered = tokens - mean
        away = mean - self.mean
        both = self.count + len(tokens)
        self._scatter += centered.T @ centered
        self._scatter += np.outer(away, away * (self.count * len(tokens) / both))
        self.mean = self.mean + away * (len(tokens) / both)
        self.count = both

    @property
    def root_mean_square(self) -> float:
        """The root mean square of all values of all tokens."""
        squares = np.trace(self._scatter) / self.count + self.mean @ self.mean
        return float(np.sqrt(squares / len(self.mean)))

    def components(self, count: int) -> Components:
        """Return the first `count` components, from the eigenvectors of the covariance."""
        covariance = self._scatter / self.count
        variances, vectors = np.linalg.eigh(covariance)  # by rising variance
        directions = vectors.T[::-1][:count]
        largest = np.abs(directions).argmax(axis=1)
        signs = np.sign(directions[np.arange(len(directions)), largest])
        return Components(
            self.mean, directions * signs[:, None], variances[::-1][:count].clip(0), float(np.trace(covariance))
        )


class Palette:
    """Maps tokens to RGB: their first three components, each scaled from its 1st to its 99th percentile.

    sample: projected tokens [T, 3] of all images, to take the percentiles of.
    noise: components that span less are shown as gray.
    """

    def __init__(self, components: Components, sample: Floats, noise: float) -> None:
        self._components = components
        self._low, high = np.percentile(sample, [LOW, HIGH], axis=0)
        span = high - self._low
        self._shown = span > noise
        self._span = np.where(self._shown, span, 1.0)

    def __call__(self, tokens: Array) -> NDArray[np.uint8]:
        """Map tokens [T, D] to colors [T, 3]."""
        scaled = (self._components.project(tokens) - self._low) / self._span
        return np.round(np.where(self._shown, scaled, 0.5).clip(0, 1) * 255).astype(np.uint8)
