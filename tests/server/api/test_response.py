"""The framed answer equals, byte for byte and but for its padding, what protobuf serializes."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3_server.api.response import PlacedBlock, max_answer_nbytes, response_pieces, stream_answer
from dinov3_server.api.status import status_of
from dinov3_server.engine.block import Block
from dinov3_server.errors import InvalidInput, Overloaded, ServingError, Unavailable
from dinov3_server.models.interface import FeatureSpec, Output, PixelShape, Pooling, Projection
from dinov3_serving.framing import Scan, schema
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import FEATURE_DTYPES
from tests.server.api.rig import MODEL

KINDS = ("cls", "patches", "registers")
kinds = st.lists(st.sampled_from(KINDS), unique=True).map(lambda chosen: [kind for kind in KINDS if kind in chosen])
layers = st.lists(
    st.tuples(st.integers(0, 299), st.booleans(), kinds.filter(bool)), max_size=3, unique_by=lambda layer: layer[:2]
)
errors = st.one_of(
    st.builds(InvalidInput, st.text(max_size=2000), field=st.text(max_size=300)),
    st.builds(Overloaded, st.text(max_size=20), reason=st.just("queue"), retry_after=st.floats(0, 1e6)),
    st.builds(Unavailable, st.text(max_size=20)),
)


@st.composite
def answers(draw: st.DrawFn) -> tuple:
    last, intermediate = draw(kinds), draw(layers)
    outputs = [Output(kind) for kind in last]
    outputs += [Output(kind, layer, norm) for layer, norm, chosen in intermediate for kind in chosen]
    spec = FeatureSpec(
        tuple(outputs or [Output("cls")]),
        draw(st.sampled_from(sorted(FEATURE_DTYPES))),
        draw(st.none() | st.builds(Pooling, st.sampled_from(["area", "bilinear"]), *[st.integers(1, 20)] * 2)),
        draw(st.sampled_from([None, "p"])),
        draw(st.booleans()),
    )
    dims, strides = draw(st.tuples(st.integers(1, 400), st.integers(1, 400))), (8, 16)
    model = replace(
        MODEL,
        # Even layers have a width and a grid of their own; odd ones, and so the last, have the final features'.
        layer_dims=dims * 150,
        layer_strides=strides * 150,
        register_tokens=draw(st.integers(1, 5)),
        fingerprint=draw(st.text(max_size=300)),
        projections=(Projection("p", dims[0], 9, "1234"),),
    )
    shapes = draw(
        st.lists(
            st.builds(PixelShape, st.sampled_from([16, 32, 48]), st.just(32), st.sampled_from(["uint8", "float32"])),
            max_size=4,
            unique=True,
        )
    )
    count = draw(st.integers(len(shapes), len(shapes) + 6))
    has_views = draw(st.booleans())
    if has_views:
        keys = sorted(draw(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 300)), min_size=count, max_size=count)))
    else:
        keys = [(image, 0) for image in range(count)]
    owner = dict(zip(keys, shapes, strict=False))
    owner |= {key: draw(st.sampled_from(shapes)) for key in keys[len(shapes) :] if shapes}
    start = 64 * draw(st.integers(0, 3))
    placed = []
    for shape in shapes:
        mine = [key for key in keys if owner[key] == shape]
        block = Block.plan(model, shape, len(mine), spec, base=placed[-1].block.end if placed else start)
        images, views = zip(*mine, strict=True)
        placed.append(PlacedBlock(block, images, views if has_views else ()))
    memory = memoryview(random.Random(draw(st.integers())).randbytes(placed[-1].block.end if placed else 0))
    failed = draw(st.dictionaries(st.integers(0, 2**32 - 1), errors, max_size=3))
    numbers = st.floats(0, 1e6, width=32)
    timings = pb.Timings(
        decode_seconds=draw(numbers), queue_seconds=draw(numbers), batches=draw(st.integers(0, 2**32 - 1))
    )
    return model, placed, memory, failed, timings, draw(st.integers(0, 300))


def as_protobuf(
    model, placed, memory, failed: dict[int, ServingError], timings: pb.Timings, frontend: int
) -> pb.ExtractResponse:
    """Build the answer row by row, following the documentation of the messages."""
    response = pb.ExtractResponse(timings=timings, frontend=frontend, fingerprint=model.fingerprint)
    for image in sorted(failed):
        response.errors.add(image_index=image, status=status_of(failed[image]))
    sizes = list(dict.fromkeys((block.shape.height, block.shape.width) for block, *_ in placed))
    for height, width in sizes:
        rows = {
            (image, view): (block, row)
            for block, images, views in placed
            if (block.shape.height, block.shape.width) == (height, width)
            for row, (image, view) in enumerate(zip(images, views or [0] * len(images), strict=True))
        }
        spec = placed[0].block.spec
        grid = spec.pooling[1:] if spec.pooling else (height // 16, width // 16)
        message = response.blocks.add(
            input_size=pb.Size(height=height, width=width),
            grid_height=grid[0],
            grid_width=grid[1],
            image_indices=[image for image, _ in sorted(rows)],
            view_indices=[view for _, view in sorted(rows)] if placed[0].views else [],
        )
        places = [rows[key] for key in sorted(rows)]
        buffer = 0
        for index, output in enumerate(spec.outputs):
            is_finer = output.layer is not None and output.layer % 2 == 0
            scale = 2 if is_finer and not spec.pooling else 1
            patches = grid[0] * grid[1] * scale**2
            tokens = {"cls": [], "patches": [patches], "registers": [model.register_tokens]}[output.kind]
            shape = [len(rows), *tokens, model.layer_dims[0 if is_finer else 1]]
            if output.kind == "patches" and spec.projection:
                shape[-1] = 9
            if output.kind == "patches" and spec.channels_first:
                shape = [len(rows), shape[-1], grid[0] * scale, grid[1] * scale]
            tensor = pb.Tensor(dtype=FEATURE_DTYPES[spec.dtype], shape=shape, data=_packed(memory, places, buffer))
            buffer += 1
            if spec.dtype == "int8":
                tensor.scales = _packed(memory, places, buffer)
                assert len(tensor.scales) == 4 * len(rows) * math.prod(tokens)
                buffer += 1
            previous = spec.outputs[index - 1] if index else None
            target = message
            if output.layer is not None:
                if previous is None or previous[1:] != output[1:]:
                    message.layers.add(layer=output.layer, grid_height=grid[0] * scale, grid_width=grid[1] * scale)
                target = message.layers[-1]
            getattr(target, output.kind).CopyFrom(tensor)
    return response


def _packed(memory: memoryview, places: list[tuple[Block, int]], buffer: int) -> bytes:
    """Return the rows at `places` in one output buffer, concatenated."""
    data = b""
    for block, row in places:
        start = block.output_offsets[buffer] + row * block.strides[buffer]
        data += memory[start : start + block.strides[buffer]]
    return data


@settings(max_examples=150, deadline=None)
@given(answers(), st.integers(0, 2**64 - 1))
def test_equals_protobuf(answer, message_id: int) -> None:
    model, placed, memory, failed, timings, frontend = answer
    pieces = response_pieces(memory, model, placed, failed, timings, frontend, model.fingerprint)
    expected = as_protobuf(*answer)
    found = pb.ExtractResponse.FromString(b"".join(pieces))
    assert len(found.padding) < 64
    assert not any(found.padding)
    found.ClearField("padding")
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)

    streamed = pb.ExtractStreamResponse.FromString(b"".join(stream_answer(message_id, pieces)))
    streamed.response.ClearField("padding")
    wanted = pb.ExtractStreamResponse(id=message_id, response=expected)
    assert streamed.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)


@settings(max_examples=100, deadline=None)
@given(answers())
def test_the_largest_tensor_of_each_block_is_aligned(answer) -> None:
    model, placed, memory, failed, timings, frontend = answer
    data = b"".join(response_pieces(memory, model, placed, failed, timings, frontend, model.fingerprint))
    scan = Scan(data)
    blocks = pb.ExtractResponse.BLOCKS_FIELD_NUMBER
    whole = np.frombuffer(data, np.uint8).ctypes.data
    for block in scan.parse(pb.ExtractResponse, {blocks: schema(pb.ExtractResponse.DESCRIPTOR)[blocks]}).blocks:
        holders = [block, *block.layers]
        tensors = [getattr(one, kind) for one in holders for kind in ("cls", "patches", "registers")]
        contents = [scan.resolve(field) for each in tensors for field in (each.data, each.scales) if field]
        largest = max(contents, key=len)
        assert any(
            (np.frombuffer(each, np.uint8).ctypes.data - whole) % 64 == 0
            for each in contents
            if len(each) == len(largest)
        )


@settings(max_examples=100, deadline=None)
@given(answers())
def test_the_upper_bound_holds_and_is_close(answer) -> None:
    model, placed, memory, _, timings, frontend = answer
    actual = sum(
        map(
            len,
            stream_answer(2**64 - 1, response_pieces(memory, model, placed, {}, timings, frontend, model.fingerprint)),
        )
    )
    bound = max_answer_nbytes([block for block, *_ in placed], model.fingerprint)
    tensors = sum(len(block.output_offsets) for block, *_ in placed)
    rows = sum(block.count for block, *_ in placed)
    assert actual <= bound <= actual + 128 + 130 * len(placed) + 64 * tensors + 10 * rows


def test_features_are_not_copied_before_they_are_joined() -> None:
    block = Block.plan(MODEL, PixelShape(32, 32, "uint8"), 2, FeatureSpec((Output("patches"),), "float32"))
    memory = memoryview(bytearray(block.end))
    pieces = response_pieces(memory, MODEL, [PlacedBlock(block, [0, 1])], {}, pb.Timings(), 0, "f00d")
    [view] = [piece for piece in pieces if isinstance(piece, memoryview)]
    assert view.obj is memory.obj
    assert len(view) == 2 * 4 * 24 * 4
    assert sum(len(piece) for piece in pieces) - len(view) < 256
