"""The wire's dtypes and numpy's."""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dinov3_serving.v1 import feature_service_pb2 as pb

Array = NDArray[Any]
FeatureDtype = Literal["float32", "float16", "bfloat16", "int8"]

_WIRE: dict[str, pb.DataType] = {
    "uint8": pb.DATA_TYPE_UINT8,
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "bfloat16": pb.DATA_TYPE_BFLOAT16,
    "int8": pb.DATA_TYPE_INT8,
}
_NAMES: dict[int, str] = {number: name for name, number in _WIRE.items()}


def wire_of(name: str) -> pb.DataType:
    return _WIRE[name]


def name_of(wire: int) -> str:
    """The name of a wire dtype; of one that this client does not know, its number."""
    return _NAMES.get(wire, f"unknown ({wire})")


def numpy_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
