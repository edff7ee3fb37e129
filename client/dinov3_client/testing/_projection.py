"""Projections of the channels of patches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinov3_serving.model import Projection


@dataclass(frozen=True)
class Linear:
    """A linear map of patch channels: weight @ token + bias."""

    weight: NDArray[np.float32]
    """[K, D]"""
    bias: NDArray[np.float32]
    """[K]"""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.weight.tobytes() + self.bias.tobytes()).hexdigest()

    def described(self, name: str) -> Projection:
        """Return the client's description of it, under a name."""
        outputs, inputs = self.weight.shape
        return Projection(name, inputs, outputs, self.fingerprint)

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map patches [P, D] to [P, K]."""
        return (patches @ self.weight.T + self.bias).astype(np.float32)


GivenProjection = Linear | ArrayLike | tuple[ArrayLike, ArrayLike]
"""A weight [K, D], or a pair of a weight [K, D] and a bias [K]."""


def read_projection(given: Any) -> Linear:
    """Return a projection given in any form. Raises ValueError."""
    if isinstance(given, Linear):
        return given
    weight, bias = given if isinstance(given, tuple) else (given, None)
    weight = np.asarray(weight, np.float32)
    bias = np.zeros(len(weight), np.float32) if bias is None else np.asarray(bias, np.float32)
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"a projection is a weight [K, D], or a pair of it and a bias [K]; this one has the shapes "
            f"{list(weight.shape)} and {list(bias.shape)}"
        )
    return Linear(weight, bias)
