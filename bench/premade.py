"""A server that answers instantly: `python -m bench.premade IMAGES` gives the same prepared answer to every Extract.

The answer is a valid ExtractResponse: bfloat16 patches of IMAGES images of 224x224 of a ViT-B/16, from a formula
(`patches`) that a client can check. Requests are not looked at. One grpc.aio server in one process, whose malloc keeps
freed memory, as our frontends' does; GetModel describes such a model.
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np
from numpy.typing import NDArray

from bench.echo import serve
from dinov3_server.families.registry import lookup
from dinov3_server.malloc import keep_freed_memory
from dinov3_server.models.variant import DATASETS
from dinov3_serving.v1 import feature_service_pb2 as pb

SIDE = 14
"""Patches in height and in width."""


def patches(images: int) -> NDArray[np.uint16]:
    """Return the bits of bfloat16 numbers, [images, P, D]: 1 + n / 128, with n repeating 0 to 126."""
    count = images * SIDE * SIDE * lookup("vitb16").layer_dims[-1]
    bits = 0x3F80 + np.arange(count, dtype=np.uint32) % 127  # the exponent of 1, and 7 bits of the fraction
    return bits.astype("<u2").reshape(images, SIDE * SIDE, -1)


def answer(images: int) -> bytes:
    features = patches(images)
    size, fingerprint = 16 * SIDE, model().fingerprint
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_BFLOAT16, shape=features.shape, data=features.tobytes())
    block = pb.FeatureBlock(
        input_size=pb.Size(height=size, width=size),
        grid_height=SIDE,
        grid_width=SIDE,
        image_indices=range(images),
        patches=tensor,
    )
    return pb.ExtractResponse(
        blocks=[block], timings=pb.Timings(batches=1), fingerprint=fingerprint
    ).SerializeToString()


def model() -> pb.GetModelResponse:
    variant, pixels = lookup("vitb16"), DATASETS["lvd1689m"]
    return pb.GetModelResponse(
        model=variant.name,
        weights="premade",
        random_weights=True,
        fingerprint="0" * 64,
        dtype=pb.DATA_TYPE_BFLOAT16,
        devices=["none"],
        embed_dim=variant.layer_dims[-1],
        depth=len(variant.layer_dims),
        layer_dims=variant.layer_dims,
        layer_strides=variant.layer_strides,
        patch_size=variant.layer_strides[-1],
        register_tokens=variant.registers,
        mean=pixels.mean,
        std=pixels.std,
        limits=pb.ServerLimits(
            max_message_bytes=64 << 20,
            max_images_per_request=64,
            max_image_pixels=1 << 26,
            max_image_tokens=8192,
            stream_window=8,
        ),
        frontends=1,
        server_version="premade",
    )


if __name__ == "__main__":
    keep_freed_memory()
    ready, about = answer(int(sys.argv[1])), model().SerializeToString()
    asyncio.run(serve({"Extract": lambda: ready, "GetModel": lambda: about}))
