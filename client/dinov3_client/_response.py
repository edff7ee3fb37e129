"""Reads an ExtractResponse and checks it against its request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from dinov3_client._answer import Answer, Block, TensorKey, Timings, TokenArray
from dinov3_client._dtypes import Array, name_of, numpy_of
from dinov3_client._errors import InvalidResponse, StatusError, from_status
from dinov3_client._pytorch import in_dataloader_worker
from dinov3_client._request import RequestOptions
from dinov3_client._split import PreparedRequest
from dinov3_client._text import printable
from dinov3_client._wire import Response
from dinov3_serving.features import TokenKind
from dinov3_serving.v1 import feature_service_pb2 as pb

_ALIGNMENT = 64  # bytes, of copies; as Arrow recommends


def read(data: bytes, prepared: PreparedRequest) -> Answer:
    """Read the ExtractResponse `data`, whose tensors become views of it if they are aligned.

    Raises InvalidResponse if `data` does not answer
    `prepared`.
    """
    response = Response(data)
    message = response.message
    fingerprint = printable(message.fingerprint)
    errors = {
        each.image_index: from_status(each.status.code, each.status.message, each.status.details)
        for each in message.errors
    }
    views = tuple(prepared.views[place] for place in prepared.sent)
    blocks = tuple(_block(block, response, prepared, views) for block in message.blocks)
    _check_rows(blocks, errors, views)
    if prepared.failed:
        places = _rows_of_images(prepared.views, prepared.sent)
        blocks = tuple(replace(block, rows=places[block.rows]) for block in blocks)
    if prepared.options.projection and "+" not in fingerprint:
        raise InvalidResponse(
            f"asked for the projection {prepared.options.projection!r}, the answer's fingerprint, "
            f"{fingerprint!r}, has none"
        )
    return Answer(
        blocks=blocks,
        errors=_of_the_call({prepared.sent[index]: error for index, error in errors.items()}, prepared),
        timings=Timings(**{field.name: getattr(message.timings, field.name) for field in fields(Timings)}),
        frontend=message.frontend,
        fingerprint=fingerprint,
        nbytes=len(data),
    )


def without_features(prepared: PreparedRequest, error: StatusError | None = None) -> Answer:
    """Return an answer to `prepared` in which all images failed: those that were not sent, the others with `error`."""
    return Answer(
        blocks=(),
        errors=_of_the_call({place: error for place in prepared.sent if error}, prepared),
        timings=Timings(0.0, 0.0, 0.0, 0, 0),
        frontend=0,
        fingerprint=prepared.answer_fingerprint,
        nbytes=0,
    )


def _of_the_call(errors: Mapping[int, StatusError], prepared: PreparedRequest) -> dict[int, StatusError]:
    """Return all errors of a request by the index of the image within the call; `errors` are the server's, by place."""
    found = {place + prepared.first: prepared.of_the_call(error) for place, error in errors.items()}
    found |= {place + prepared.first: error for place, error in prepared.failed.items()}
    return {image: found[image].of_image(image, prepared.labels.get(image)) for image in sorted(found)}


def _rows_of_images(views: Sequence[int], images: Sequence[int]) -> Array:
    """Return the numbers of the rows of `images`, among the rows of all images, which have so many `views` each."""
    counts = np.maximum(views, 1)
    found: Array = np.flatnonzero(np.isin(np.repeat(np.arange(len(counts)), counts), images))
    return found


def _block(block: pb.FeatureBlock, response: Response, prepared: PreparedRequest, views: Sequence[int]) -> Block:
    options = prepared.options
    found = tuple(layer.layer for layer in block.layers)
    if found != prepared.layers:
        raise InvalidResponse(f"asked for the layers {list(prepared.layers)}, the answer has {list(found)}")
    rows = _rows(block, views)
    grids: dict[int | None, tuple[int, int]] = {}
    tensors: dict[TensorKey, TokenArray] = {}
    holders: list[tuple[int | None, tuple[TokenKind, ...], pb.FeatureBlock | pb.LayerFeatures]] = [
        (None, options.kinds, block),
        *((layer.asked, layer.kinds, holder) for layer, holder in zip(options.layers, block.layers, strict=True)),
    ]
    for layer, kinds, holder in holders:
        grids[layer] = (holder.grid_height, holder.grid_width)
        for kind in kinds:
            name = kind if layer is None else f"layer {layer}'s {kind}"
            if not holder.HasField(kind):
                raise InvalidResponse(f"asked for {name}, the answer has none")
            tensor = getattr(holder, kind)
            tensors[layer, kind] = _tokens(tensor, response, name, kind, len(rows), grids[layer], options)
    return Block((block.input_size.height, block.input_size.width), grids, rows, tensors)


def _rows(block: pb.FeatureBlock, asked: Sequence[int]) -> Array:
    """Return the number of each row within the answer: images in order, and the views of each in order.

    asked: the number of views of each image that was sent.
    """
    images = np.array(block.image_indices, np.int64)
    views = np.array(block.view_indices, np.int64)
    if len(views) != (len(images) if any(asked) else 0):
        raise InvalidResponse(
            f"a block of {len(images)} rows has {len(views)} view indices; the request has "
            f"{'' if any(asked) else 'no '}views"
        )
    counts = np.maximum(asked, 1)
    known = images < len(counts)
    if not known.all() or (len(views) and not (views < counts[images]).all()):
        raise InvalidResponse(
            f"the answer to {len(counts)} images has the rows {_shortened(images)} and views {_shortened(views)}"
        )
    rows: Array = (np.cumsum(counts) - counts)[images]
    if len(views):
        rows = rows + views
    if not (np.diff(rows) > 0).all():
        raise InvalidResponse(
            f"rows are not in order: the answer to {len(counts)} images has the rows {_shortened(images)} and views "
            f"{_shortened(views)}"
        )
    return rows


def _tokens(
    tensor: pb.Tensor,
    response: Response,
    name: str,
    kind: TokenKind,
    rows: int,
    grid: tuple[int, int],
    options: RequestOptions,
) -> TokenArray:
    dtype = options.dtype
    if name_of(tensor.dtype) != dtype:
        raise InvalidResponse(f"asked for {dtype}, {name} came as {name_of(tensor.dtype)}")
    shape = tuple(tensor.shape)
    data, scales = response.content(tensor.data), response.content(tensor.scales)
    item = numpy_of(dtype)
    if any(side < 1 for side in shape) or math.prod(shape) * item.itemsize != len(data):
        raise InvalidResponse(f"{name} of shape {list(shape)} and {dtype} has {len(data)} bytes")
    if kind == "patches" and options.pooling and grid != options.pooling.grid:
        raise InvalidResponse(f"asked for patches pooled to {options.pooling.grid}, {name} has a grid of {grid}")
    fixed, free = _expected_shape(kind, rows, grid, options.channels_first)
    if len(shape) != len(fixed) or any(
        side is not None and side != given for side, given in zip(fixed, shape, strict=True)
    ):
        raise InvalidResponse(f"{name} has shape {list(shape)} for {rows} rows and a grid of {grid}; it must be {free}")
    tokens = (rows,) if kind == "cls" else (rows, shape[1] if kind == "registers" else math.prod(grid))
    nbytes = 4 * math.prod(tokens) if dtype == "int8" else 0
    if len(scales) != nbytes:
        raise InvalidResponse(f"{name} of shape {list(shape)} and {dtype} has {len(scales)} bytes of scales")
    values = _array(data, item).reshape(shape)
    return TokenArray(values, _array(scales, np.dtype("<f4")).reshape(tokens) if dtype == "int8" else None)


def _array(data: memoryview, dtype: np.dtype[Any]) -> Array:
    """Return a view of `data`, or a copy: in a DataLoader's worker, since torch's collation warns of read-only arrays,
    and if it is not aligned to its items, as Arrow and Lance need it (the server aligns a message's largest tensor).
    """
    array: Array = np.frombuffer(data, dtype)
    in_worker = in_dataloader_worker()
    if array.flags.aligned and not in_worker:
        return array
    buffer = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    begin = -buffer.ctypes.data % _ALIGNMENT
    copy: Array = buffer[begin : begin + array.nbytes].view(dtype)
    copy[:] = array
    copy.flags.writeable = in_worker
    return copy


def _expected_shape(
    kind: TokenKind, rows: int, grid: tuple[int, int], channels_first: bool
) -> tuple[tuple[int | None, ...], str]:
    """Return the shape, with None for sides that only the response determines, and the shape in words."""
    if kind == "cls":
        return (rows, None), "[rows, D]"
    if kind == "registers":
        return (rows, None, None), "[rows, registers, D]"
    if channels_first:
        return (rows, None, *grid), "[rows, D, grid height, grid width]"
    return (rows, math.prod(grid), None), "[rows, patches, D]"


def _check_rows(blocks: Iterable[Block], errors: Mapping[int, StatusError], views: Sequence[int]) -> None:
    """Raise InvalidResponse unless every row occurs once; only rows of failed images may be missing."""
    counts = np.maximum(views, 1)
    seen = np.zeros(counts.sum(), np.int64)
    for block in blocks:
        seen[block.rows] += 1
    if (seen > 1).any():
        raise InvalidResponse(
            f"the answer to {len(counts)} images has rows twice: {_shortened(np.flatnonzero(seen > 1))}"
        )
    if any(image >= len(counts) for image in errors):
        raise InvalidResponse(f"the answer to {len(counts)} images has errors for {sorted(errors)}")
    images = np.repeat(np.arange(len(counts)), counts)
    missing = np.setdiff1d(images[seen == 0], list(errors))
    if len(missing):
        raise InvalidResponse(f"the answer has neither features nor an error for the images {_shortened(missing)}")


def _shortened(numbers: Array) -> str:
    most = 20
    shown = ", ".join(map(str, numbers[:most]))
    return f"[{shown}{', ...' if len(numbers) > most else ''}]"
