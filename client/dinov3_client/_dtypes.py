"""Conversions between dtype names, the wire's DataType and numpy dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import FEATURE_DTYPES, PIXEL_FORMATS

Array = NDArray[Any]

_WIRE: dict[str, pb.DataType] = dict([*PIXEL_FORMATS.items(), *FEATURE_DTYPES.items()])
_NAMES: dict[int, str] = {number: name for name, number in _WIRE.items()}


def wire_of(name: str) -> pb.DataType:
    """Return the DataType of a dtype name."""
    return _WIRE[name]


def name_of(wire: int) -> str:
    """Return the name of a DataType, or its number if this client does not know it."""
    return _NAMES.get(wire, f"unknown ({wire})")


def numpy_of(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a dtype name; bfloat16 is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
