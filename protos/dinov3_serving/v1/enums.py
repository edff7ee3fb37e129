"""The names that the Python APIs of client and server use for the enum values on the wire."""

from __future__ import annotations

from typing import Literal

from dinov3_serving.presets import Interpolation, Preset, PresetName
from dinov3_serving.v1 import feature_service_pb2 as pb

FeatureDtype = Literal["float32", "float16", "bfloat16", "int8"]
PixelDtype = Literal["uint8", "float32"]
PoolingMethod = Literal["area", "bilinear"]

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
FEATURE_DTYPES: dict[FeatureDtype, pb.DataType] = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "bfloat16": pb.DATA_TYPE_BFLOAT16,
    "int8": pb.DATA_TYPE_INT8,
}
PIXEL_DTYPES: dict[PixelDtype, pb.DataType] = {
    "uint8": pb.DATA_TYPE_UINT8,
    "float32": pb.DATA_TYPE_FLOAT32,
}
POOLING_METHODS: dict[PoolingMethod, pb.PoolingMethod] = {
    "area": pb.POOLING_METHOD_AREA,
    "bilinear": pb.POOLING_METHOD_BILINEAR,
}


def preset_message(preset: Preset) -> pb.PresetInfo:
    """Return the entry of GetModelResponse.presets for `preset`."""
    size = pb.Size(height=preset.size[0], width=preset.size[1]) if preset.size else None
    return pb.PresetInfo(preset=PRESETS[preset.name], size=size, interpolation=INTERPOLATIONS[preset.interpolation])
