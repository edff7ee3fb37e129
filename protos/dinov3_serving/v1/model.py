"""Describe a model in a GetModelResponse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dinov3_serving.model import Limits, ModelDescription, ParityCheck
from dinov3_serving.presets import Preset
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import FEATURE_DTYPES, FIT_METHODS, INTERPOLATIONS, PRESETS


def model_message(
    model: ModelDescription,
    limits: Limits,
    *,
    devices: Sequence[str],
    frontends: int,
    frontend: int,
    server_version: str,
    presets: Iterable[Preset],
    image_formats: Iterable[str],
) -> pb.GetModelResponse:
    """Return the description of `model` as it is served by one of the frontends."""
    return pb.GetModelResponse(
        model=model.name,
        weights=model.weights,
        random_weights=model.random_weights,
        fingerprint=model.fingerprint,
        dtype=_DTYPES[model.dtype],
        devices=devices,
        embed_dim=model.embed_dim,
        depth=model.depth,
        patch_size=model.patch_size,
        register_tokens=model.register_tokens,
        mean=model.mean,
        std=model.std,
        parameters=model.parameters,
        layer_dims=model.layer_dims,
        layer_strides=model.layer_strides,
        limits=pb.ServerLimits(**asdict(limits)),
        frontends=frontends,
        frontend=frontend,
        server_version=server_version,
        parity_check=_parity_check(model.parity_check),
        projections=[pb.Projection(**asdict(projection)) for projection in model.projections],
        presets=map(_preset, presets),
        image_formats=image_formats,
        fit_methods=FIT_METHODS.values(),
    )


_DTYPES: dict[str, pb.DataType] = dict(FEATURE_DTYPES.items())


def _parity_check(check: ParityCheck) -> pb.ParityCheck:
    fields: dict[str, Any] = asdict(check)
    fields["outputs"] = [pb.OutputParity(**each | {"dtype": _DTYPES[each["dtype"]]}) for each in fields["outputs"]]
    return pb.ParityCheck(**fields)


def _preset(preset: Preset) -> pb.PresetInfo:
    size = pb.Size(height=preset.size[0], width=preset.size[1]) if preset.size else None
    return pb.PresetInfo(preset=PRESETS[preset.name], size=size, interpolation=INTERPOLATIONS[preset.interpolation])
