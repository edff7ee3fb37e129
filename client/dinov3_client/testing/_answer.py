"""Answers an ExtractRequest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3_client._dtypes import numpy_of, wire_of
from dinov3_client._model import Model
from dinov3_client._request import Pooling
from dinov3_client.testing._failure import Failure, status_of
from dinov3_client.testing._formula import expected, quantized
from dinov3_client.testing._images import FeatureRow, feature_rows
from dinov3_client.testing._projection import Linear
from dinov3_serving.errors import ServingError
from dinov3_serving.features import FeatureSpec, Output
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.images import ImageReader
from dinov3_serving.v1.request import answer_fingerprint, check_pins, is_bulk, read_outputs, too_large


def answer(
    request: pb.ExtractRequest, model: Model, projections: Mapping[str, Linear], failing: Mapping[int, Failure]
) -> pb.ExtractResponse:
    """Return the response, without its frontend. Images in `failing` fail. Raises ServingError."""
    limits = model.limits
    check_pins(request, model)
    spec = read_outputs(request.outputs, model, limits.max_image_tokens)
    is_bulk(request)  # raises if it is neither; a fake server has no queue
    reader = ImageReader(
        request,
        model,
        max_images=limits.max_images_per_request,
        max_tokens=limits.max_image_tokens,
        presets=model.presets,
    )
    rows = feature_rows(reader, limits.max_image_pixels)
    failures: dict[int, Failure | ServingError] = {**reader.failures}
    failures |= {image: failing[image] for image in {row.image for row in rows} & set(failing)}
    sizes: dict[tuple[int, int], list[FeatureRow]] = {}
    for row in rows:
        sizes.setdefault(row.size, []).append(row._replace(pixels=None) if row.image in failing else row)
    has_views = any(image.views for image in request.images)
    projection = projections[spec.projection] if spec.projection else None
    response = pb.ExtractResponse(
        blocks=[_block(size, rows, has_views, spec, projection, model) for size, rows in sizes.items()],
        errors=[pb.ImageError(image_index=image, status=status_of(failures[image])) for image in sorted(failures)],
        timings=pb.Timings(decode_seconds=0.25, queue_seconds=0.5, inference_seconds=0.75, batch_images=4, batches=2),
        fingerprint=answer_fingerprint(model, spec.projection),
    )
    if response.ByteSize() > limits.max_message_bytes:
        raise too_large(f"{response.ByteSize()} bytes", limits.max_message_bytes)
    return response


def _block(
    size: tuple[int, int],
    rows: list[FeatureRow],
    has_views: bool,
    spec: FeatureSpec,
    projection: Linear | None,
    model: Model,
) -> pb.FeatureBlock:
    block = pb.FeatureBlock(
        input_size=pb.Size(height=size[0], width=size[1]),
        image_indices=[row.image for row in rows],
        view_indices=[row.view for row in rows] if has_views else [],
    )
    block.grid_height, block.grid_width = model.grid(size, None, spec.pooling)
    layers: dict[tuple[int | None, bool], Any] = {(None, True): block}
    for output in spec.outputs:
        kind, layer, norm = output
        if (layer, norm) not in layers:
            layers[layer, norm] = block.layers.add(layer=layer)
            layers[layer, norm].grid_height, layers[layer, norm].grid_width = model.grid(size, layer, spec.pooling)
        getattr(layers[layer, norm], kind).CopyFrom(_tensor(output, size, rows, spec, projection, model))
    return block


def _tensor(
    output: Output,
    size: tuple[int, int],
    rows: list[FeatureRow],
    spec: FeatureSpec,
    projection: Linear | None,
    model: Model,
) -> pb.Tensor:
    kind, layer, norm = output
    pooling = spec.pooling and Pooling((spec.pooling.rows, spec.pooling.columns), spec.pooling.method)
    black = np.zeros((*size, 3), np.uint8)
    packed: NDArray[Any] = np.stack(
        [
            expected(
                black if row.pixels is None else row.pixels,
                kind,
                layer=layer,
                norm=norm,
                pooling=pooling,
                projection=projection,
                model=model,
            )
            for row in rows
        ]
    )
    packed[[row.pixels is None for row in rows]] = 0
    scales = b""
    if spec.dtype == "int8":
        packed, scale = quantized(packed)
        scales = scale.tobytes()
    if kind == "patches" and spec.channels_first:
        packed = packed.reshape(len(rows), *model.grid(size, layer, spec.pooling), -1).transpose(0, 3, 1, 2)
    data = packed.astype(numpy_of(spec.dtype)).tobytes()
    return pb.Tensor(dtype=wire_of(spec.dtype), shape=packed.shape, data=data, scales=scales)
