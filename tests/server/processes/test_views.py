"""Views through a whole server: the rows of an image are in several batches, and fail together."""

from __future__ import annotations

import grpc
import numpy as np
from PIL import Image

from dinov3_server.models.interface import Output
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.support.numpy_runner import DIE, NAN, expected
from tests.support.server import Server
from tests.support.waiting import LIMIT, until

# (top, left, height, width), size of the model's input, flipped
VIEWS = [
    ((0, 0, 64, 64), 32, False),
    ((10, 20, 40, 44), 32, True),
    ((0, 0, 48, 80), 16, False),
    ((5, 5, 16, 16), 16, True),
]


def image(pixels: np.ndarray) -> pb.Image:
    message = pb.Image(pixels=pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=pixels.shape, data=pixels.tobytes()))
    for (top, left, height, width), size, flip in VIEWS:
        message.views.add(
            crop=pb.Box(top=top, left=left, height=height, width=width),
            size=pb.Size(height=size, width=size),
            horizontal_flip=flip,
            interpolation=pb.INTERPOLATION_NEAREST,
        )
    return message


def view_pixels(pixels: np.ndarray, view: int) -> np.ndarray:
    (top, left, height, width), size, flip = VIEWS[view]
    part = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    part = part.resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part)


def test_a_view_that_fails_on_the_device_fails_only_its_image() -> None:
    photos = [np.random.default_rng(seed).integers(0, 250, (70, 90, 3), np.uint8) for seed in range(5)]
    # Only view 2 begins with that pixel: nearest takes the center of the first 3 rows and 5 columns.
    photos[1][1, 2] = NAN
    photos[3][1, 2] = DIE
    for bad, order in ((1, NAN), (3, DIE)):
        assert [tuple(view_pixels(photos[bad], view)[0, 0]) == order for view in range(4)] == [
            False,
            False,
            True,
            False,
        ]
    outputs = pb.Outputs(cls=True, patches=True, dtype=pb.DATA_TYPE_FLOAT32)
    request = pb.ExtractRequest(images=map(image, photos), outputs=outputs)
    with Server("--frontends", "1") as server:
        with grpc.insecure_channel(server.grpc) as channel:
            call = channel.unary_unary(
                "/dinov3_serving.v1.FeatureService/Extract",
                request_serializer=pb.ExtractRequest.SerializeToString,
                response_deserializer=pb.ExtractResponse.FromString,
            )
            answer: pb.ExtractResponse = call(request, timeout=LIMIT)
        until(lambda: server.metric("dinov3_worker_restarts_total") == 2)  # one died beside others, one alone
    assert [(error.image_index, error.status.code) for error in answer.errors] == [(1, 13), (3, 13)]  # INTERNAL
    assert [block.input_size.height for block in answer.blocks] == [32, 16]
    for block in answer.blocks:
        for message, kind in ((block.cls, "cls"), (block.patches, "patches")):
            rows = np.frombuffer(message.data, np.float32).reshape(message.shape)
            for row, index, view in zip(rows, block.image_indices, block.view_indices, strict=True):
                if index in (1, 3):
                    assert not row.any()
                else:
                    np.testing.assert_array_equal(row, expected(view_pixels(photos[index], view), Output(kind)))
    keys = [list(zip(block.image_indices, block.view_indices, strict=True)) for block in answer.blocks]
    assert keys == [[(i, v) for i in range(5) for v in (0, 1)], [(i, v) for i in range(5) for v in (2, 3)]]
