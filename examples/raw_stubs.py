"""Print features of photos as JSON lines, with nothing of this project but its .proto file.

    pip install grpcio grpcio-tools numpy
    python -m grpc_tools.protoc -I protos --python_out=stubs --grpc_python_out=stubs \
        protos/dinov3_serving/v1/feature_service.proto                       # the folder stubs must exist
    PYTHONPATH=stubs python examples/raw_stubs.py PHOTO... > features.jsonl

The server is DINOV3_TARGET (default localhost:50051). Each line has the photo's path, its CLS token and the mean of its
patch tokens.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np

from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1 import feature_service_pb2_grpc as rpc

TARGET = os.environ.get("DINOV3_TARGET") or "localhost:50051"
PHOTOS_PER_REQUEST = 32
DTYPES = {pb.DATA_TYPE_FLOAT32: "<f4", pb.DATA_TYPE_FLOAT16: "<f2"}
OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # gRPC refuses answers over 4 MB by default
    ("grpc.max_send_message_length", -1),
]


def array(tensor: pb.Tensor) -> np.ndarray:
    """Return a tensor as an array, without a copy."""
    return np.frombuffer(tensor.data, DTYPES[tensor.dtype]).reshape(tuple(tensor.shape))


def extract(stub: rpc.FeatureServiceStub, photos: list[str]) -> Iterator[dict[str, object]]:
    request = pb.ExtractRequest(
        images=[pb.Image(encoded=Path(photo).read_bytes()) for photo in photos],
        preprocessing=pb.Preprocessing(preset=pb.PRESET_DINOV3),
        # The default dtype is bfloat16, which numpy does not have.
        outputs=pb.Outputs(cls=True, patches=True, dtype=pb.DATA_TYPE_FLOAT16),
    )
    answer = stub.Extract(request, timeout=60, wait_for_ready=True)
    failed = {error.image_index: error.status.message for error in answer.errors}
    for index, reason in failed.items():
        print(f"{photos[index]}: {reason}", file=sys.stderr)
    for block in answer.blocks:  # one for each input size
        cls, patches = array(block.cls), array(block.patches)
        rows, dims = len(block.image_indices), cls.shape[1]
        assert cls.shape == (rows, dims), cls.shape
        assert patches.shape == (rows, block.grid_height * block.grid_width, dims), patches.shape
        for index, one, tokens in zip(block.image_indices, cls, patches, strict=True):
            if index not in failed:  # the row of an image that failed is zeros
                mean = tokens.mean(0, dtype=np.float32)
                yield {"photo": photos[index], "cls": one.tolist(), "patch_mean": mean.tolist()}


def main(photos: list[str]) -> None:
    with grpc.insecure_channel(TARGET, OPTIONS) as channel:
        stub = rpc.FeatureServiceStub(channel)
        model = stub.GetModel(pb.GetModelRequest(), timeout=60, wait_for_ready=True)
        print(f"{model.model}, {model.embed_dim} channels", file=sys.stderr)
        for start in range(0, len(photos), PHOTOS_PER_REQUEST):
            for line in extract(stub, photos[start : start + PHOTOS_PER_REQUEST]):
                print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1:])
