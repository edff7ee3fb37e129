"""Answers an ExtractRequest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import grpc
import numpy as np
from numpy.typing import NDArray

from dinov3_client._dtypes import numpy_of
from dinov3_client._model import Model
from dinov3_client._request import KINDS, Pooling, TokenKind
from dinov3_client.testing._failure import Failure, invalid
from dinov3_client.testing._formula import expected, quantised
from dinov3_client.testing._images import FeatureRow, RequestReader, Size, enum_of
from dinov3_client.testing._projection import Linear
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import FEATURE_DTYPES, POOLING_METHODS

_DTYPES = {number: numpy_of(name) for name, number in FEATURE_DTYPES.items()}
_METHODS = {number: name for name, number in POOLING_METHODS.items()}
_CHANNELS_FIRST: dict[int, bool] = {
    pb.PATCH_LAYOUT_UNSPECIFIED: False,
    pb.PATCH_LAYOUT_TOKENS: False,
    pb.PATCH_LAYOUT_CHANNELS_FIRST: True,
}
_PRIORITIES = dict.fromkeys(pb.Priority.values(), None)


class Group(NamedTuple):
    """The requested tensors of one layer; `layer` None is the last one."""

    layer: int | None
    norm: bool
    kinds: list[TokenKind]


class Outputs(NamedTuple):
    """The checked outputs of a request."""

    groups: list[Group]
    dtype: pb.DataType
    pooling: Pooling | None
    projection: Linear | None
    channels_first: bool

    def sent_grid(self, size: Size, layer: int | None, model: Model) -> tuple[int, int]:
        return self.pooling.grid if self.pooling else _grid(size, layer, model)


def answer(
    request: pb.ExtractRequest, model: Model, projections: Mapping[str, Linear], failing: Mapping[int, Failure]
) -> pb.ExtractResponse:
    """Return the response, without its frontend. Images in `failing` fail. Raises Failure for an invalid request."""
    fingerprint = _check_pins(request, model, projections)
    outputs = _outputs(request.outputs, model, projections)
    enum_of(pb.Priority, _PRIORITIES, request.priority, "priority")
    reader = RequestReader(request.preprocessing, model)
    reader.read(request)
    failures = reader.failures | {image: failing[image] for image in {row.image for row in reader.rows} & set(failing)}
    sizes: dict[Size, list[FeatureRow]] = {}
    for row in reader.rows:
        sizes.setdefault(row.size, []).append(row._replace(pixels=None) if row.image in failing else row)
    has_views = any(image.views for image in request.images)
    response = pb.ExtractResponse(
        blocks=[_block(size, rows, has_views, outputs, model) for size, rows in sizes.items()],
        errors=[pb.ImageError(image_index=image, status=failures[image].status()) for image in sorted(failures)],
        timings=pb.Timings(decode_seconds=0.25, queue_seconds=0.5, inference_seconds=0.75, batch_images=4, batches=2),
        fingerprint=fingerprint,
    )
    nbytes, most = response.ByteSize(), model.limits.max_message_bytes
    if nbytes > most:
        raise invalid(
            f"the answer would be over the limit of {most} bytes a message: it would take {nbytes} bytes", "outputs"
        )
    return response


def _check_pins(request: pb.ExtractRequest, model: Model, projections: Mapping[str, Linear]) -> str:
    """Return the fingerprint of the answer. Raises Failure if the request pins another one."""
    fingerprint = model.fingerprint
    if request.outputs.projection in projections:
        fingerprint += "+" + projections[request.outputs.projection].fingerprint
    for what, asked, served in (
        ("model", request.model, {model.name}),
        ("fingerprint", request.fingerprint, {model.fingerprint, fingerprint}),
    ):
        if asked and asked not in served:
            raise Failure(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this server serves the {what} {getattr(model, 'name' if what == 'model' else what)!r}; the request "
                f"asks for {asked!r}",
            )
    return fingerprint


def _outputs(outputs: pb.Outputs, model: Model, projections: Mapping[str, Linear]) -> Outputs:
    kinds = [kind for kind in KINDS if getattr(outputs, kind)]
    groups = [Group(None, True, kinds)] if kinds else []
    for index, entry in enumerate(outputs.layers):
        field = f"outputs.layers[{index}]"
        if entry.layer >= model.depth:
            raise invalid(f"there is no layer {entry.layer}: allowed are 0 to {model.depth - 1}", f"{field}.layer")
        group = Group(entry.layer, not entry.skip_norm, [kind for kind in KINDS if getattr(entry, kind)])
        if not group.kinds:
            raise invalid(f"layer {entry.layer} is asked for nothing: set cls, patches or registers", field)
        if group[:2] in [other[:2] for other in groups]:
            raise invalid(f"layer {entry.layer} is asked for again: give each once", field)
        groups.append(group)
    groups = groups or [Group(None, True, ["cls", "patches"])]
    if not model.register_tokens and any("registers" in group.kinds for group in groups):
        raise invalid(f"{model.name} has no register tokens: leave registers out", "outputs.registers")
    dtype = outputs.dtype or pb.DATA_TYPE_BFLOAT16
    enum_of(pb.DataType, _DTYPES, dtype, "outputs.dtype")
    pooling = _pooling(outputs.pooling, model) if outputs.HasField("pooling") else None
    channels_first = enum_of(pb.PatchLayout, _CHANNELS_FIRST, outputs.patch_layout, "outputs.patch_layout")
    projection = _projection(outputs.projection, groups, model, projections)
    return Outputs(groups, dtype, pooling, projection, channels_first)


def _pooling(given: pb.Pooling, model: Model) -> Pooling:
    rows, columns = given.grid_height, given.grid_width
    for side in ("grid_height", "grid_width"):
        if not getattr(given, side):
            raise invalid(f"{side} is 0: a grid has at least one row and one column", f"outputs.pooling.{side}")
    most = model.limits.max_image_tokens
    if rows * columns > most:
        raise invalid(f"a grid of {rows}x{columns} is over the {most} tokens of an image", "outputs.pooling")
    method = given.method or pb.POOLING_METHOD_AREA
    return Pooling((rows, columns), enum_of(pb.PoolingMethod, _METHODS, method, "outputs.pooling.method"))


def _projection(name: str, groups: list[Group], model: Model, projections: Mapping[str, Linear]) -> Linear | None:
    if not name:
        return None
    if name not in projections:
        known = ", ".join(map(repr, projections)) or "none"
        raise invalid(f"there is no projection {name!r}; this server has {known}", "outputs.projection")
    channels = projections[name].weight.shape[1]
    for group in groups:
        width = model.embed_dim if group.layer is None else model.layer_dims[group.layer]
        if "patches" in group.kinds and width != channels:
            raise invalid(
                f"the projection {name!r} takes {channels} channels; the patches asked for have {width}",
                "outputs.projection",
            )
    return projections[name]


def _block(size: Size, rows: list[FeatureRow], has_views: bool, outputs: Outputs, model: Model) -> pb.FeatureBlock:
    block = pb.FeatureBlock(
        input_size=pb.Size(height=size[0], width=size[1]),
        image_indices=[row.image for row in rows],
        view_indices=[row.view for row in rows] if has_views else [],
    )
    block.grid_height, block.grid_width = outputs.sent_grid(size, None, model)
    for group in outputs.groups:
        holder: Any = block
        if group.layer is not None:
            holder = block.layers.add(layer=group.layer)
            holder.grid_height, holder.grid_width = outputs.sent_grid(size, group.layer, model)
        for kind in group.kinds:
            getattr(holder, kind).CopyFrom(_tensor(kind, group, size, rows, outputs, model))
    return block


def _tensor(
    kind: TokenKind, group: Group, size: Size, rows: list[FeatureRow], outputs: Outputs, model: Model
) -> pb.Tensor:
    black = np.zeros((*size, 3), np.uint8)
    packed: NDArray[Any] = np.stack(
        [
            expected(
                black if row.pixels is None else row.pixels,
                kind,
                layer=group.layer,
                norm=group.norm,
                pooling=outputs.pooling,
                projection=outputs.projection,
                model=model,
            )
            for row in rows
        ]
    )
    packed[[row.pixels is None for row in rows]] = 0
    scales = b""
    if outputs.dtype == pb.DATA_TYPE_INT8:
        packed, scale = quantised(packed)
        scales = scale.tobytes()
    if kind == "patches" and outputs.channels_first:
        grid = outputs.sent_grid(size, group.layer, model)
        packed = packed.reshape(len(rows), *grid, -1).transpose(0, 3, 1, 2)
    data = packed.astype(_DTYPES[outputs.dtype]).tobytes()
    return pb.Tensor(dtype=outputs.dtype, shape=packed.shape, data=data, scales=scales)


def _grid(size: tuple[int, ...], layer: int | None, model: Model) -> tuple[int, int]:
    stride = model.patch_size if layer is None else model.layer_strides[layer]
    return size[0] // stride, size[1] // stride
