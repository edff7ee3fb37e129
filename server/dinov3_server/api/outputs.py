"""Check that the answer to a request fits into a message."""

from __future__ import annotations

from collections.abc import Iterable

from dinov3_server.api.response import max_answer_nbytes
from dinov3_server.engine.block import Block
from dinov3_server.models.interface import ModelInfo, Output
from dinov3_serving.v1.request import too_large


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


def _name(output: Output) -> str:
    return output.kind if output.layer is None else f"layer {output.layer} {output.kind}"
