"""The model and the limits of a server, read from GetModelResponse."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from google.protobuf.message import DecodeError

from dinov3_client._dtypes import name_of
from dinov3_client._errors import InvalidResponse
from dinov3_client._text import printable
from dinov3_serving.model import Limits, ModelDescription, OutputParity, ParityCheck, Projection
from dinov3_serving.presets import PRESETS, FitMethod, Preset
from dinov3_serving.v1 import enums
from dinov3_serving.v1 import feature_service_pb2 as pb

_SHOWN = 5  # faults in an error message
_INTERPOLATIONS = {number: name for name, number in enums.INTERPOLATIONS.items()}


@dataclass(frozen=True, kw_only=True)
class Model(ModelDescription):
    """The model that a server serves."""

    devices: tuple[str, ...]
    limits: Limits
    frontends: int
    """Server processes that share the port."""
    frontend: int
    """The index of the one that answered."""
    server_version: str
    presets: tuple[Preset, ...]
    """The size (None: pixels as they are) and interpolation of each `preset` of `extract`."""

    def __repr__(self) -> str:
        weights = f"random weights ({self.weights})" if self.random_weights else f"weights {self.weights}"
        dims, strides = ("/".join(map(str, dict.fromkeys(each))) for each in (self.layer_dims, self.layer_strides))
        return (
            f"<Model {self.name}: {weights}, fingerprint {self.fingerprint}, {dims} channels, {self.depth} layers, "
            f"patch {strides}, {self.register_tokens} registers, {self.dtype} on {', '.join(self.devices)}, "
            f"features {'verified' if self.parity_check.verified else 'not verified'}>"
        )

    image_formats: tuple[str, ...]
    """The formats of image files that the server decodes: "JPEG", "PNG", ..."""
    fit_methods: tuple[FitMethod, ...]
    """What `fit` may be."""


def read_model(data: bytes) -> Model:
    """Read a GetModelResponse, making its texts printable.

    Raises InvalidResponse if it is none, or describes an impossible model.
    """
    try:
        response = pb.GetModelResponse.FromString(data)
    except DecodeError:
        raise InvalidResponse(
            f"the {len(data)} bytes received are no {pb.GetModelResponse.DESCRIPTOR.full_name}"
        ) from None
    model = Model(
        name=printable(response.model),
        weights=printable(response.weights),
        random_weights=response.random_weights,
        fingerprint=printable(response.fingerprint),
        dtype=name_of(response.dtype),
        devices=tuple(map(printable, response.devices)),
        layer_dims=tuple(response.layer_dims),
        layer_strides=tuple(response.layer_strides),
        register_tokens=response.register_tokens,
        mean=tuple(response.mean),
        std=tuple(response.std),
        parameters=response.parameters,
        limits=Limits(**{field.name: getattr(response.limits, field.name) for field in fields(Limits)}),
        frontends=response.frontends,
        frontend=response.frontend,
        server_version=printable(response.server_version),
        parity_check=_parity_check(response),
        projections=tuple(
            Projection(printable(each.name), each.input_channels, each.output_channels, printable(each.fingerprint))
            for each in response.projections
        ),
        presets=_presets(response),
        image_formats=tuple(map(printable, response.image_formats)),
        fit_methods=_fit_methods(response),
    )
    _check(model, response)
    return model


def _check(model: Model, response: pb.GetModelResponse) -> None:
    """Raise InvalidResponse for a model with which no request could be made or response read."""
    least = {
        "depth": response.depth,
        "frontends": model.frontends,
        **{f"limits.{name}": limit for name, limit in vars(model.limits).items()},
        **{f"layer_dims[{index}]": dim for index, dim in enumerate(model.layer_dims)},
        **{f"layer_strides[{index}]": stride for index, stride in enumerate(model.layer_strides)},
        **{
            f"projections[{index}].output_channels": each.output_channels
            for index, each in enumerate(model.projections)
        },
        **{f"a side of the preset {each.name!r}": min(each.size) for each in model.presets if each.size},
    }
    wrong = [f"{name} is 0" for name, number in least.items() if number < 1]
    for name, values, count in (
        ("layer_dims", model.layer_dims, response.depth),
        ("layer_strides", model.layer_strides, response.depth),
        ("mean", model.mean, 3),
        ("std", model.std, 3),
    ):
        if len(values) != count:
            wrong.append(f"{name} has {len(values)} numbers, not {count}")
    for name, total, each in (
        ("embed_dim", response.embed_dim, model.layer_dims),
        ("patch_size", response.patch_size, model.layer_strides),
    ):
        if each and total != each[-1]:
            wrong.append(f"{name} is {total}, and the last layer has {each[-1]}")
    if not all(map(math.isfinite, (*model.mean, *model.std))) or not all(each > 0 for each in model.std):
        wrong.append(f"images cannot be normalized by the mean {model.mean} and the std {model.std}")
    if not model.fingerprint:
        wrong.append("fingerprint is empty")
    if wrong:
        raise InvalidResponse(f"the server describes an impossible model: {'; '.join(wrong[:_SHOWN])}")


def _presets(response: pb.GetModelResponse) -> tuple[Preset, ...]:
    """Return the presets that this client knows, as the server lists them, or as in the contract if it does not."""
    listed = {each.preset: each for each in response.presets}
    found = []
    for preset in PRESETS:
        each = listed.get(enums.PRESETS[preset.name])
        if each is not None:
            size = (each.size.height, each.size.width) if each.HasField("size") else None
            preset = Preset(preset.name, size, _INTERPOLATIONS.get(each.interpolation, preset.interpolation))
        found.append(preset)
    return tuple(found)


def _fit_methods(response: pb.GetModelResponse) -> tuple[FitMethod, ...]:
    """Return the methods that this client knows. A server that lists none is older than the others."""
    listed = {*response.fit_methods, pb.FIT_METHOD_STRETCH}
    return tuple(name for name, number in enums.FIT_METHODS.items() if number in listed)


def _parity_check(response: pb.GetModelResponse) -> ParityCheck:
    if not response.HasField("parity_check"):
        return ParityCheck(False, "the server reports no parity check", "", (), "", "")
    check = response.parity_check
    return ParityCheck(
        verified=check.verified,
        reason=printable(check.reason),
        upstream_revision=printable(check.upstream_revision),
        outputs=tuple(
            OutputParity(printable(proof.output), name_of(proof.dtype), proof.least_cosine, proof.relative_error)
            for proof in check.outputs
        ),
        time=printable(check.time),
        not_covered=printable(check.not_covered),
    )
