"""Computes the fingerprint of a model: equal for the same model from any file format, different for anything that can
change a feature."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dinov3_server.backbone.weights.checkpoint import Checkpoint

# Version of the arithmetic in families/ and nn/. Raise it when features change by more than rounding.
BACKBONE = "ours-1"


def fingerprint(checkpoint: Checkpoint, *, dtype: str, preprocessing: str, backbone: str = BACKBONE) -> str:
    """Return 32 hex digits: sha256, cut to 16 bytes, over everything that determines the features of an encoded image.

    That is the canonical tensors and constants (name, shape, little-endian fp32 values), the variant, the input
    normalization, the serving dtype, `backbone` (whose code computes, and its version), and `preprocessing`, the
    identity of what turns images into pixels.
    """
    tensors = checkpoint.tensors
    # hashlib and torch release the GIL on large buffers; each thread holds one tensor in fp32 at a time.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
    identity = {
        "backbone": backbone,
        "dtype": dtype,
        "mean": checkpoint.dataset.mean,
        "model": checkpoint.variant.name,
        "preprocessing": preprocessing,
        "std": checkpoint.dataset.std,
        "tensors": digests,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def digest(tensor: Tensor) -> str:
    """Return the sha256 of its shape and its values in little-endian fp32."""
    values = tensor.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
    hashed = hashlib.sha256(f"{values.shape}".encode())
    hashed.update(values.reshape(-1).data)
    return hashed.hexdigest()
