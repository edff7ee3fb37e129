"""Read all of a request but its images, and check which model it asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import get_args

from dinov3_serving.errors import InvalidInput, ModelMismatch
from dinov3_serving.features import FeatureSpec, Output, Pooling, TokenKind
from dinov3_serving.model import ModelDescription
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import FEATURE_DTYPES, POOLING_METHODS, enum_of

_FEATURE_DTYPES = {number: name for name, number in FEATURE_DTYPES.items()}
_KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
_METHODS = {number: name for name, number in POOLING_METHODS.items()}
# Longer Outputs, which plain requests never have, are not cached, so that the cache stays small.
_MAX_CACHED_BYTES = 256
_IS_CHANNELS_FIRST = {pb.PATCH_LAYOUT_TOKENS: False, pb.PATCH_LAYOUT_CHANNELS_FIRST: True}
_IS_BULK = {pb.PRIORITY_INTERACTIVE: False, pb.PRIORITY_BULK: True}


def read_outputs(outputs: pb.Outputs, model: ModelDescription, max_tokens: int) -> FeatureSpec:
    """Return the features that a request asks for. A pooled grid may have `max_tokens` patches.

    Raises InvalidInput, naming the field at fault.
    """
    serialized = outputs.SerializeToString()
    if len(serialized) > _MAX_CACHED_BYTES:
        return _read_outputs(outputs, model, max_tokens)
    return _cached_outputs(serialized, model, max_tokens)


def is_bulk(request: pb.ExtractRequest) -> bool:
    """Return whether the priority of a request is bulk. Raises InvalidInput."""
    return enum_of(pb.Priority, _IS_BULK, request.priority or pb.PRIORITY_INTERACTIVE, "priority")


def answer_fingerprint(model: ModelDescription, projection: str | None) -> str:
    """Return the fingerprint of features: the model's, and the projection's if one was applied."""
    for each in model.projections:
        if each.name == projection:
            return f"{model.fingerprint}+{each.fingerprint}"
    return model.fingerprint


def check_pins(request: pb.ExtractRequest, model: ModelDescription, full_name: Callable[[str], str] = str) -> None:
    """Raise ModelMismatch if a request asks for another model. `full_name` returns the name of a model for an alias."""
    if request.model and full_name(request.model) != model.name:
        raise ModelMismatch(f"this server serves the model {model.name!r}; the request asks for {request.model!r}")
    if not request.fingerprint:
        return
    served = {model.fingerprint: "the fingerprint"}
    if projection := request.outputs.projection:
        served.setdefault(answer_fingerprint(model, projection), f"with the projection {projection!r}")
    if request.fingerprint not in served:
        allowed = " and ".join(f"{what} {fingerprint!r}" for fingerprint, what in served.items())
        raise ModelMismatch(f"this server serves {allowed}; the request asks for {request.fingerprint!r}")


def check_stream_request(message: pb.ExtractStreamRequest) -> None:
    """Raise InvalidInput unless a message of a stream has a possible timeout and a request."""
    timeout = message.timeout_seconds
    if not (math.isfinite(timeout) and timeout >= 0):
        raise InvalidInput(
            f"timeout_seconds is {timeout:g}; allowed are positive numbers, and 0 for the deadline of the call",
            field="timeout_seconds",
        )
    if not message.HasField("request"):
        raise InvalidInput("request is not set: every message of a stream needs one", field="request")


def too_large(answer: str, limit: int) -> InvalidInput:
    """Return the error of an answer that is over the limit of a message; `answer` says how large it is."""
    return InvalidInput(
        f"the answer would be over the limit of {limit} bytes per message: send fewer images, request fewer "
        f"outputs or a smaller dtype, or start the server with a larger --max-message-bytes. It would take {answer}",
        field="outputs",
    )


@lru_cache(maxsize=256)  # the requests of a caller mostly have the same Outputs
def _cached_outputs(serialized: bytes, model: ModelDescription, max_tokens: int) -> FeatureSpec:
    return _read_outputs(pb.Outputs.FromString(serialized), model, max_tokens)


def _read_outputs(outputs: pb.Outputs, model: ModelDescription, max_tokens: int) -> FeatureSpec:
    requested = [Output(kind) for kind in _KINDS if getattr(outputs, kind)]
    first_use: dict[tuple[int, bool], int] = {}
    for index, entry in enumerate(outputs.layers):
        field = f"outputs.layers[{index}]"
        if entry.layer >= model.depth:
            raise InvalidInput(
                f"there is no layer {entry.layer}: {model.name} has the layers 0 to {model.depth - 1}",
                field=f"{field}.layer",
            )
        kinds = [kind for kind in _KINDS if getattr(entry, kind)]
        if not kinds:
            raise InvalidInput(f"layer {entry.layer} has no outputs: set cls, patches or registers", field=field)
        first = first_use.setdefault((entry.layer, entry.skip_norm), index)
        if first != index:
            raise InvalidInput(f"this layer is in outputs.layers[{first}] already: list each layer once", field=field)
        requested += [Output(kind, entry.layer, norm=not entry.skip_norm) for kind in kinds]
    if not model.register_tokens and any(output.kind == "registers" for output in requested):
        raise InvalidInput(f"{model.name} has no register tokens: leave registers out", field="outputs.registers")
    dtype = enum_of(pb.DataType, _FEATURE_DTYPES, outputs.dtype or pb.DATA_TYPE_BFLOAT16, "outputs.dtype")
    spec = FeatureSpec(
        tuple(requested or (Output("cls"), Output("patches"))),
        dtype,
        _pooling(outputs.pooling, max_tokens) if outputs.HasField("pooling") else None,
        outputs.projection or None,
        enum_of(
            pb.PatchLayout,
            _IS_CHANNELS_FIRST,
            outputs.patch_layout or pb.PATCH_LAYOUT_TOKENS,
            "outputs.patch_layout",
        ),
    )
    _check_projection(spec, model)
    return spec


def _pooling(pooling: pb.Pooling, max_tokens: int) -> Pooling:
    rows, columns = pooling.grid_height, pooling.grid_width
    for side in ("grid_height", "grid_width"):
        if not getattr(pooling, side):
            raise InvalidInput(f"{side} is 0: a grid has at least one row and one column", f"outputs.pooling.{side}")
    if rows * columns > max_tokens:
        raise InvalidInput(
            f"a grid of {rows}x{columns} is {rows * columns} patches an image; allowed are {max_tokens} "
            "(--max-batch-tokens)",
            field="outputs.pooling",
        )
    method = pooling.method or pb.POOLING_METHOD_AREA
    return Pooling(enum_of(pb.PoolingMethod, _METHODS, method, "outputs.pooling.method"), rows, columns)


def _check_projection(spec: FeatureSpec, model: ModelDescription) -> None:
    """Check that the projection exists and fits the channels of all requested patches. Raises InvalidInput."""
    if spec.projection is None:
        return
    field = "outputs.projection"
    named = {projection.name: projection for projection in model.projections}
    if spec.projection not in named:
        known = f"allowed are {', '.join(named)}" if named else "the server was started with none (--projections)"
        raise InvalidInput(f"there is no projection {spec.projection!r}: {known}", field)
    takes = named[spec.projection].input_channels
    for output in spec.outputs:
        width = model.width(output.layer)
        if output.kind == "patches" and width != takes:
            of = "the patches" if output.layer is None else f"the patches of layer {output.layer}"
            fitting = ", ".join(name for name, each in named.items() if each.input_channels == width)
            raise InvalidInput(
                f"the projection {spec.projection!r} takes {takes} channels, and {of} have {width}; "
                f"projections for {width} channels: {fitting or 'none'}",
                field,
            )
