"""The wire's dtypes and numpy's."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import FEATURE_DTYPES, PIXEL_DTYPES

Array = NDArray[Any]

_WIRE: dict[str, pb.DataType] = dict([*PIXEL_DTYPES.items(), *FEATURE_DTYPES.items()])
_NAMES: dict[int, str] = {number: name for name, number in _WIRE.items()}


def wire_of(name: str) -> pb.DataType:
    return _WIRE[name]


def name_of(wire: int) -> str:
    """The name of a wire dtype; of one that this client does not know, its number."""
    return _NAMES.get(wire, f"unknown ({wire})")


def numpy_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
