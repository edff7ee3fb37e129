"""The names that the Python APIs of client and server use for the enum values on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from dinov3_serving.errors import InvalidInput
from dinov3_serving.features import FeatureDtype, PoolingMethod
from dinov3_serving.images import PixelFormat
from dinov3_serving.presets import FitMethod, Interpolation, PresetName
from dinov3_serving.v1 import feature_service_pb2 as pb

E = TypeVar("E", bound=int)
T = TypeVar("T")

PRESETS: dict[PresetName, pb.Preset] = {
    "dinov3": pb.PRESET_DINOV3,
    "hf": pb.PRESET_HF,
    "none": pb.PRESET_NONE,
}
INTERPOLATIONS: dict[Interpolation, pb.Interpolation] = {
    "nearest": pb.INTERPOLATION_NEAREST,
    "bilinear": pb.INTERPOLATION_BILINEAR,
    "bicubic": pb.INTERPOLATION_BICUBIC,
    "lanczos": pb.INTERPOLATION_LANCZOS,
}
FIT_METHODS: dict[FitMethod, pb.FitMethod] = {
    "stretch": pb.FIT_METHOD_STRETCH,
    "crop": pb.FIT_METHOD_CROP,
    "pad": pb.FIT_METHOD_PAD,
}
FEATURE_DTYPES: dict[FeatureDtype, pb.DataType] = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "bfloat16": pb.DATA_TYPE_BFLOAT16,
    "int8": pb.DATA_TYPE_INT8,
}
PIXEL_FORMATS: dict[PixelFormat, pb.DataType] = {
    "uint8": pb.DATA_TYPE_UINT8,
    "float32": pb.DATA_TYPE_FLOAT32,
}
POOLING_METHODS: dict[PoolingMethod, pb.PoolingMethod] = {
    "area": pb.POOLING_METHOD_AREA,
    "bilinear": pb.POOLING_METHOD_BILINEAR,
}


def enum_of(names: EnumTypeWrapper, allowed: Mapping[E, T], value: E, field: str) -> T:
    """Return `allowed[value]` for a value of a protobuf enum. Raises InvalidInput, also for numbers without a name."""
    if value in allowed:
        return allowed[value]
    given = names.Name(value) if value in names.values() else str(value)
    raise InvalidInput(
        f"{field.rpartition('.')[2]} is {given}; allowed are {', '.join(map(names.Name, allowed))}", field=field
    )
