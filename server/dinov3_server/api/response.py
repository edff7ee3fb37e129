"""Build the bytes of an ExtractResponse from ranges of the arena, with one copy.

protobuf's Python API takes tensor data as `bytes` only and copies it three times: out of the arena, into the message,
and into the serialized message. So protobuf serializes only the few bytes around the tensors, and this module frames
them (https://protobuf.dev/programming-guides/encoding/): fields in the order of their numbers, each message or byte
string as tag, length and content. The result equals `SerializeToString` of the same message, but for the padding, which
comes before each block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from dinov3_server.api.status import status_of
from dinov3_server.engine.block import Block
from dinov3_server.errors import ServingError
from dinov3_server.models.interface import FeatureSpec, ModelInfo, OutputBuffer, PixelShape
from dinov3_serving.framing import tag
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import FEATURE_DTYPES

# Consecutive pieces of a serialized message; the large ones are views of the arena.
Pieces = list["bytes | memoryview"]
# A serialized message without its tensor data: what precedes each of k pieces of data, and what follows the last.
Frames = list[bytes]

_BLOCK_FIELDS = {"cls": 6, "patches": 7, "registers": 8}
_LAYERS_FIELD = 9
_PADDING_FIELD = pb.ExtractResponse.PADDING_FIELD_NUMBER
# Readers that view tensors in the received message need them aligned to their items (Arrow, Lance). 64 bytes are what
# Arrow recommends.
_ALIGNMENT = 64
_TENSOR_FIELDS = (3, 4)  # data and scales
_LAYER_FIELDS = {"cls": 2, "patches": 3, "registers": 4}


class PlacedBlock(NamedTuple):
    """A block in the arena. Its row r is view `views[r]` of image `images[r]` of the request; the pairs ascend.

    `views` is empty if no image of the request has views.
    """

    block: Block
    images: Sequence[int]
    views: Sequence[int] = ()


class _Run(NamedTuple):
    """Consecutive rows of a block, from `start` to before `end`."""

    block: Block
    start: int
    end: int


def response_pieces(
    memory: memoryview,
    model: ModelInfo,
    blocks: Sequence[PlacedBlock],
    errors: Mapping[int, ServingError],
    timings: pb.Timings,
    frontend: int,
    fingerprint: str,
) -> Pieces:
    """Return the pieces of an ExtractResponse. `errors` are by image, whose rows are already zero in the arena."""
    pieces: Pieces = []
    nbytes = 0
    for same_size in _by_size(blocks):
        block = _feature_block(memory, model, same_size)
        block = [_padding(nbytes, block), *block]
        nbytes += sum(map(len, block))
        pieces += block
    rest = pb.ExtractResponse(
        errors=[pb.ImageError(image_index=image, status=status_of(errors[image])) for image in sorted(errors)],
        timings=timings,
        frontend=frontend,
        fingerprint=fingerprint,
    )
    return [*pieces, rest.SerializeToString()]


def stream_answer(message_id: int, response: Pieces) -> Pieces:
    """Return the pieces of the ExtractStreamResponse that contains `response`."""
    header = pb.ExtractStreamResponse(id=message_id).SerializeToString()
    return [header + tag(2, sum(map(len, response))), *response]


def max_answer_nbytes(blocks: Iterable[Block], fingerprint: str) -> int:
    """Return an upper bound of the bytes of an answer without errors, close to the bytes of its features."""
    total = 128 + len(fingerprint.encode())
    for block in blocks:
        total += 66 + _ALIGNMENT + 10 * block.count + sum(64 + block.count * stride for stride in block.strides)
    return total


def _by_size(blocks: Sequence[PlacedBlock]) -> list[list[PlacedBlock]]:
    """Group blocks by input size: uint8 and float pixels are two blocks in the engine, but one on the wire."""
    by_size: dict[tuple[int, int], list[PlacedBlock]] = {}
    for placed in blocks:
        by_size.setdefault((placed.block.shape.height, placed.block.shape.width), []).append(placed)
    return list(by_size.values())


def _feature_block(memory: memoryview, model: ModelInfo, blocks: Sequence[PlacedBlock]) -> Pieces:
    """Return field 1 of the answer, a FeatureBlock."""
    shape, spec = blocks[0].block.shape, blocks[0].block.spec
    images, views, runs = _in_order(blocks)
    pieces: Pieces = []
    *heads, end = _frames(model, shape, spec, tuple(images), tuple(views))
    for buffer, head in enumerate(heads):
        pieces.append(head)
        pieces += [_rows(memory, run, buffer) for run in runs]
    return [*pieces, end]


def _padding(position: int, block: Pieces) -> bytes:
    """Return the padding at `position` of the message, after which the largest tensor of `block` is aligned.

    The smaller ones are not: they lie in messages of their own, whose lengths padding would change.
    """
    tensors: dict[int, int] = {}  # the bytes of each, by where it begins in the block
    begin = offset = 0
    for piece in block:
        if isinstance(piece, bytes):
            begin = offset + len(piece)
        else:
            tensors[begin] = tensors.get(begin, 0) + len(piece)
        offset += len(piece)
    header = len(tag(_PADDING_FIELD, 0))
    nbytes = -(position + header + max(tensors, key=tensors.__getitem__)) % _ALIGNMENT
    return tag(_PADDING_FIELD, nbytes) + bytes(nbytes)


@lru_cache(maxsize=256)  # the requests of a caller are mostly alike
def _frames(
    model: ModelInfo, shape: PixelShape, spec: FeatureSpec, images: tuple[int, ...], views: tuple[int, ...]
) -> Frames:
    """Return the field of a FeatureBlock, without the data and scales of its outputs."""
    grid_height, grid_width = model.grid(shape, pooling=spec.pooling)
    header = pb.FeatureBlock(
        input_size=pb.Size(height=shape.height, width=shape.width),
        grid_height=grid_height,
        grid_width=grid_width,
        image_indices=images,
        view_indices=views,
    )
    block: Frames = [header.SerializeToString()]
    nbytes = 0
    buffers = model.output_buffers(spec, shape)
    for (layer, _), of_layer in groupby(buffers, key=lambda buffer: (buffer.output.layer, buffer.output.norm)):
        fields = _BLOCK_FIELDS if layer is None else _LAYER_FIELDS
        group: Frames = [b"" if layer is None else pb.LayerFeatures(layer=layer).SerializeToString()]
        of_group = 0
        for output, of_output in groupby(of_layer, key=lambda buffer: buffer.output):
            tensor, of_tensor = _tensor(list(of_output), len(images))
            group = _joined(group, _message(fields[output.kind], tensor, of_tensor))
            of_group += of_tensor
        if layer is not None:
            grid_height, grid_width = model.grid(shape, layer, spec.pooling)
            grid = pb.LayerFeatures(
                grid_height=grid_height, grid_width=grid_width
            )  # the fields with the highest numbers
            group = _message(_LAYERS_FIELD, _joined(group, [grid.SerializeToString()]), of_group)
        block = _joined(block, group)
        nbytes += of_group
    return _message(1, block, nbytes)


def _message(number: int, content: Frames, nbytes: int) -> Frames:
    """Return field `number`, a message of `content` with `nbytes` of data in it."""
    return [tag(number, sum(map(len, content)) + nbytes) + content[0], *content[1:]]


def _joined(first: Frames, second: Frames) -> Frames:
    return [*first[:-1], first[-1] + second[0], *second[1:]]


def _in_order(blocks: Sequence[PlacedBlock]) -> tuple[Sequence[int], Sequence[int], list[_Run]]:
    """Return the images and views of all `blocks`, ascending, and the runs of rows in this order."""
    if len(blocks) == 1:
        block, images, views = blocks[0]
        return images, views, [_Run(block, 0, len(images))]
    has_views = bool(blocks[0].views)
    rows = sorted(
        (image, placed.views[row] if has_views else 0, which, row)
        for which, placed in enumerate(blocks)
        for row, image in enumerate(placed.images)
    )
    runs: list[_Run] = []
    for _, _, which, row in rows:
        block = blocks[which].block
        if runs and runs[-1].block is block:  # rows of a block ascend as well, so they are consecutive
            runs[-1] = runs[-1]._replace(end=row + 1)
        else:
            runs.append(_Run(block, row, row + 1))
    return [row[0] for row in rows], [row[1] for row in rows] if has_views else (), runs


def _rows(memory: memoryview, run: _Run, buffer: int) -> memoryview:
    """Return the rows of a run in one output buffer."""
    stride, base = run.block.strides[buffer], run.block.output_offsets[buffer]
    return memory[base + run.start * stride : base + run.end * stride]


def _tensor(buffers: Sequence[OutputBuffer], rows: int) -> tuple[Frames, int]:
    """Return a Tensor without the content of its `buffers`, and the bytes of that content."""
    values = buffers[0]
    frames = [pb.Tensor(dtype=FEATURE_DTYPES[values.dtype], shape=(rows, *values.shape)).SerializeToString()]
    nbytes = 0
    for number, buffer in zip(_TENSOR_FIELDS, buffers, strict=False):
        frames = _joined(frames, [tag(number, rows * buffer.nbytes), b""])
        nbytes += rows * buffer.nbytes
    return frames, nbytes
