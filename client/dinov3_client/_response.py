"""An answer, checked against its request and read."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from dinov3_client._dtypes import Array, name_of, numpy_of
from dinov3_client._errors import InvalidResponse, from_status, image_errors
from dinov3_client._features import Block, Features, Key, Packing, Timings
from dinov3_client._request import OnError, Query
from dinov3_serving.v1 import feature_service_pb2 as pb


def read(response: pb.ExtractResponse, query: Query, on_error: OnError) -> Features:
    """The features of the answer to `query`.

    Raises ImageErrors where images failed and `on_error` is "raise", InvalidResponse where the answer is not one
    to this request.
    """
    errors = {
        each.image_index: from_status(each.status.code, each.status.message, each.status.details)
        for each in response.errors
    }
    if errors and on_error == "raise":
        raise image_errors(errors, query.labels, query.count)
    blocks = [_block(block, query) for block in response.blocks]
    _check_rows(blocks, errors, query.count)
    _check_shapes(blocks)
    shapes = {key: _shape_without_row(key, blocks) for key in _keys(query)}
    return Features(
        Packing(query.count, blocks, shapes, numpy_of(query.options.dtype)),
        layers=query.options.layers,
        errors=errors,
        timings=Timings(
            decode_seconds=response.timings.decode_seconds,
            queue_seconds=response.timings.queue_seconds,
            inference_seconds=response.timings.inference_seconds,
            batch_images=response.timings.batch_images,
            batches=response.timings.batches,
        ),
        frontend=response.frontend,
        fingerprint=response.fingerprint,
    )


def _keys(query: Query) -> list[Key]:
    return [(layer, kind) for layer in (None, *query.options.layers) for kind in query.options.kinds]


def _block(block: pb.FeatureBlock, query: Query) -> Block:
    found = tuple(layer.layer for layer in block.layers)
    if found != query.blocks:
        raise InvalidResponse(f"asked for the layers {list(query.blocks)}, the answer has {list(found)}")
    rows = len(block.image_indices)
    grids: dict[int | None, tuple[int, int]] = {}
    tensors: dict[Key, Array] = {}
    holders: Iterable[tuple[int | None, pb.FeatureBlock | pb.LayerFeatures]] = [
        (None, block),
        *zip(query.options.layers, block.layers, strict=True),
    ]
    for layer, holder in holders:
        grids[layer] = (holder.grid_height, holder.grid_width)
        for kind in query.options.kinds:
            name = kind if layer is None else f"layer {layer}'s {kind}"
            if not holder.HasField(kind):
                raise InvalidResponse(f"asked for {name}, the answer has none")
            array = _array(getattr(holder, kind), name, query.options.dtype)
            tokens = {"cls": (), "patches": (math.prod(grids[layer]),), "registers": array.shape[1:2]}[kind]
            if array.ndim != 2 + (kind != "cls") or array.shape[:-1] != (rows, *tokens):
                raise InvalidResponse(
                    f"{name} has shape {list(array.shape)} for {rows} images and a grid of {grids[layer]}"
                )
            tensors[layer, kind] = array
    return Block(
        (block.input_size.height, block.input_size.width), grids, np.array(block.image_indices, np.int64), tensors
    )


def _array(tensor: pb.Tensor, name: str, dtype: str) -> Array:
    """A read-only view of the tensor's bytes, which were copied once, out of the message."""
    if name_of(tensor.dtype) != dtype:
        raise InvalidResponse(f"asked for {dtype}, {name} came as {name_of(tensor.dtype)}")
    item = numpy_of(dtype).newbyteorder("<") if dtype != "bfloat16" else numpy_of(dtype)
    data = tensor.data
    shape = tuple(tensor.shape)
    if any(side < 0 for side in shape) or math.prod(shape) * item.itemsize != len(data):
        raise InvalidResponse(f"{name} of shape {list(shape)} and {dtype} has {len(data)} bytes")
    return np.frombuffer(data, item).reshape(shape)


def _check_rows(blocks: list[Block], errors: Iterable[int], count: int) -> None:
    """Every image has one row; only a failed one may have none."""
    order = [block.rows.tolist() for block in blocks]
    rows = sorted(row for block in order for row in block)
    if (
        any(block != sorted(block) for block in order)
        or len(set(rows)) < len(rows)
        or any(row >= count for row in (*rows, *errors))
    ):
        raise InvalidResponse(f"the answer to {count} images has the rows {order} and errors for {sorted(errors)}")
    missing = sorted(set(range(count)) - set(rows) - set(errors))
    if missing:
        raise InvalidResponse(f"the answer has neither features nor an error for the images {missing}")


def _check_shapes(blocks: list[Block]) -> None:
    """Channels and registers are the model's, so that they are the same in all blocks."""
    for block in blocks[1:]:
        for key, tensor in block.tensors.items():
            first = blocks[0].tensors[key]
            same = tensor.shape[2:] == first.shape[2:] if key[1] == "patches" else tensor.shape[1:] == first.shape[1:]
            if not same:
                raise InvalidResponse(f"{key[1]} has shapes {list(first.shape)} and {list(tensor.shape)} in one answer")


def _shape_without_row(key: Key, blocks: list[Block]) -> tuple[int, ...]:
    """Of one failed image whose input size is unknown: as far as the others tell it."""
    if not blocks:
        return (0,) if key[1] == "cls" else (0, 0)
    shape = blocks[0].tensors[key].shape[1:]
    return (0, shape[-1]) if key[1] == "patches" else shape
