"""Check the Outputs of a request, and that its answer fits into a message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from dinov3_server.api.response import max_answer_nbytes
from dinov3_server.engine.block import Block
from dinov3_server.errors import InvalidInput
from dinov3_server.models.interface import FeatureSpec, ModelInfo, Output, Pooling, TokenKind
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import FEATURE_DTYPES, POOLING_METHODS

_FEATURE_DTYPES = {number: name for name, number in FEATURE_DTYPES.items()}
_KINDS: tuple[TokenKind, ...] = ("cls", "patches", "registers")
_METHODS = {number: name for name, number in POOLING_METHODS.items()}
# Longer Outputs, which plain requests never have, are not cached, so that the cache stays small.
_MAX_CACHED_BYTES = 256
_IS_CHANNELS_FIRST = {pb.PATCH_LAYOUT_TOKENS: False, pb.PATCH_LAYOUT_CHANNELS_FIRST: True}

E = TypeVar("E", bound=int)
T = TypeVar("T")


def read_outputs(outputs: pb.Outputs, model: ModelInfo, max_tokens: int) -> FeatureSpec:
    """Return the features that a request asks for. A pooled grid may have `max_tokens` patches.

    Raises InvalidInput, naming the field at fault.
    """
    serialized = outputs.SerializeToString()
    if len(serialized) > _MAX_CACHED_BYTES:
        return _read_outputs(outputs, model, max_tokens)
    return _cached_outputs(serialized, model, max_tokens)


@lru_cache(maxsize=256)  # the requests of a caller mostly have the same Outputs
def _cached_outputs(serialized: bytes, model: ModelInfo, max_tokens: int) -> FeatureSpec:
    return _read_outputs(pb.Outputs.FromString(serialized), model, max_tokens)


def _read_outputs(outputs: pb.Outputs, model: ModelInfo, max_tokens: int) -> FeatureSpec:
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
    if not model.registers and any(output.kind == "registers" for output in requested):
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


def _check_projection(spec: FeatureSpec, model: ModelInfo) -> None:
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


def enum_of(names: EnumTypeWrapper, allowed: Mapping[E, T], value: E, field: str) -> T:
    """Return `allowed[value]` for a value of a protobuf enum. Raises InvalidInput, also for numbers without a name."""
    if value in allowed:
        return allowed[value]
    given = names.Name(value) if value in names.values() else str(value)
    raise InvalidInput(
        f"{field.rpartition('.')[2]} is {given}; allowed are {', '.join(map(names.Name, allowed))}", field=field
    )


def check_answer_size(blocks: Iterable[Block], model: ModelInfo, fingerprint: str, limit: int) -> None:
    """Raise InvalidInput if the answer would be over `limit` bytes."""
    blocks = list(blocks)
    total = max_answer_nbytes(blocks, fingerprint)
    if total <= limit:
        return
    terms = []
    for block in blocks:
        sizes: dict[Output, int] = {}
        for buffer in model.output_buffers(block.spec, block.shape):
            sizes[buffer.output] = sizes.get(buffer.output, 0) + buffer.nbytes
        kinds = ", ".join(f"{_name(output)} {nbytes}" for output, nbytes in sizes.items())
        size = f"{block.shape.height}x{block.shape.width}"
        terms.append(f"{block.count} image(s) of {size} at {sum(block.strides)} bytes ({kinds})")
    raise too_large(f"{total} bytes ({'; '.join(terms)}, in {blocks[0].spec.dtype})", limit)


def too_large(answer: str, limit: int) -> InvalidInput:
    return InvalidInput(
        f"the answer would be over the limit of {limit} bytes per message: send fewer images, request fewer "
        f"outputs or a smaller dtype, or start the server with a larger --max-message-bytes. It would take {answer}",
        field="outputs",
    )


def _name(output: Output) -> str:
    return output.kind if output.layer is None else f"layer {output.layer} {output.kind}"
