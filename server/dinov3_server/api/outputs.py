"""The Outputs of a request, checked, and whether its answer fits a message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from dinov3_server.api.response import DTYPES, most_nbytes
from dinov3_server.backbone.interface import FeatureSpec, ModelInfo, Output, TokenKind
from dinov3_server.engine.block import Block
from dinov3_server.errors import InvalidInput
from dinov3_serving.v1 import feature_service_pb2 as pb

_FEATURE_DTYPES = {number: name for name, number in DTYPES.items()}
_KINDS: tuple[TokenKind, ...] = ("cls", "patches", "registers")

E = TypeVar("E", bound=int)
T = TypeVar("T")


def read_outputs(outputs: pb.Outputs, model: ModelInfo) -> FeatureSpec:
    """Raises InvalidInput, naming the field at fault."""
    wanted = [Output(kind) for kind in _KINDS if getattr(outputs, kind)]
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
            raise InvalidInput(f"layer {entry.layer} is asked for nothing: set cls, patches or registers", field=field)
        first = first_use.setdefault((entry.layer, entry.skip_norm), index)
        if first != index:
            raise InvalidInput(f"asks for the layer of outputs.layers[{first}] again: give each once", field=field)
        wanted += [Output(kind, entry.layer, norm=not entry.skip_norm) for kind in kinds]
    if not model.registers and any(output.kind == "registers" for output in wanted):
        raise InvalidInput(f"{model.name} has no register tokens: leave registers out", field="outputs.registers")
    dtype = enum_of(pb.DataType, _FEATURE_DTYPES, outputs.dtype or pb.DATA_TYPE_BFLOAT16, "outputs.dtype")
    return FeatureSpec(tuple(wanted or (Output("cls"), Output("patches"))), dtype)


def enum_of(names: EnumTypeWrapper, allowed: Mapping[E, T], value: E, field: str) -> T:
    """What `allowed` has for an enum's `value`; proto3 lets numbers through that have no name."""
    if value in allowed:
        return allowed[value]
    given = names.Name(value) if value in names.values() else str(value)
    raise InvalidInput(
        f"{field.rpartition('.')[2]} is {given}; allowed are {', '.join(map(names.Name, allowed))}", field=field
    )


def check_answer(blocks: Iterable[Block], model: ModelInfo, limit: int) -> None:
    """Raises InvalidInput where the answer would be over `limit` bytes."""
    blocks = list(blocks)
    total = most_nbytes(blocks, model.fingerprint)
    if total <= limit:
        return
    terms = []
    for block in blocks:
        named = zip(block.spec.outputs, block.strides, strict=True)
        kinds = ", ".join(f"{_name(output)} {nbytes}" for output, nbytes in named)
        size = f"{block.shape.height}x{block.shape.width}"
        terms.append(f"{block.count} image(s) of {size} at {sum(block.strides)} bytes ({kinds})")
    raise too_large(f"{total} bytes ({'; '.join(terms)}, in {blocks[0].spec.dtype})", limit)


def too_large(answer: str, limit: int) -> InvalidInput:
    return InvalidInput(
        f"the answer would be over the limit of {limit} bytes a message: send fewer images a request, ask for fewer "
        f"outputs or a smaller dtype, or start the server with a larger --max-message-bytes. It would take {answer}",
        field="outputs",
    )


def _name(output: Output) -> str:
    return output.kind if output.layer is None else f"layer {output.layer} {output.kind}"
