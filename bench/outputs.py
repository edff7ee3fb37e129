"""The cost of a wire dtype in fidelity, and of pooling, projecting and quantizing in time.

Fidelity: ViT-S/16 in float32 with the random weights of seed 7 on the 12 photos in scikit-image's wheel, at 224x224
(Pillow, bilinear). The features that the CPU runner writes in a dtype, as a client reads them, are compared with those
that it writes in float32: the least and the mean cosine over the CLS and all patch tokens of all photos (2364). The
same for patches pooled to 7x7 by area (588), since quantization comes after pooling. Bytes are of the CLS and patch
tokens of one image of ViT-B/16 at 224x224, with the scales of int8.

Time: images/s of the CPU runner alone (pixels in an arena to features in an arena), ViT-S/16 in the dtype of `dtype
auto`, batches of 8 at 224x224, CLS and patches. The variants take turns; each figure is the median of
its rounds. `share` is the additional time of a variant over the time of plain bfloat16.
"""

from __future__ import annotations

import mmap
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image
from torch import Tensor

from bench.preprocessing import PHOTOS
from bench.record import table
from dinov3_server.backbone.runner import build
from dinov3_server.backbone.runners.base import TorchRunner
from dinov3_server.backbone.runners.self_test import run_image
from dinov3_server.engine.block import Block
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import Batch, FeatureDtype, FeatureSpec, Output, PixelShape, Pooling, Row

SHAPE = PixelShape(224, 224, "uint8")
BOTH = (Output("cls"), Output("patches"))
DTYPES: tuple[FeatureDtype, ...] = ("float32", "float16", "bfloat16", "int8")
POOLED = Pooling("area", 7, 7)
SPECS = {
    "bfloat16": FeatureSpec(BOTH, "bfloat16"),
    "int8": FeatureSpec(BOTH, "int8"),
    "7x7 area": FeatureSpec(BOTH, "bfloat16", POOLED),
    "7x7 bilinear": FeatureSpec(BOTH, "bfloat16", Pooling("bilinear", 7, 7)),
    "projected to 64": FeatureSpec(BOTH, "bfloat16", None, "p64"),
    "channels first": FeatureSpec(BOTH, "bfloat16", channels_first=True),
    "7x7 area, projected, int8": FeatureSpec(BOTH, "int8", POOLED, "p64"),
}
BATCH, ROUNDS, ARENA = 8, 15, 0


def measure() -> dict[str, Any]:
    exact = build("vits16", "random:7", dtype="float32", warm_up=())
    images = list(map(_photo, PHOTOS))
    fidelity = [_fidelity(exact, images, dtype) for dtype in DTYPES]
    exact.close()
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/p64.npy", np.random.default_rng(0).standard_normal((64, 384)).astype(np.float32))
        served = build("vits16", "random:7", projections=[("p64", f"{folder}/p64.npy")])
    time_of = _rounds(served, images[:BATCH])
    served.close()
    plain = time_of["bfloat16"]
    speed = [
        {
            "outputs": name,
            "images_per_second": round(BATCH / seconds, 1),
            "ms_per_image": round(1000 * seconds / BATCH, 3),
            "share": round(seconds / plain - 1, 4),
        }
        for name, seconds in time_of.items()
    ]
    return {"fidelity": fidelity, "model_dtype": served.info.dtype, "speed": speed}


def show(result: dict[str, Any]) -> str:
    columns = ("dtype", "vitb_bytes", "least_cosine", "mean_cosine", "pooled_least_cosine", "pooled_mean_cosine")
    return "\n\n".join((table(result["fidelity"], *columns), table(result["speed"], *result["speed"][0])))


def _photo(name: str) -> Tensor:
    with Image.open(Path(skimage.__file__).parent / "data" / name) as photo:
        resized = photo.convert("RGB").resize((SHAPE.width, SHAPE.height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized))


def _fidelity(runner: TorchRunner, images: list[Tensor], dtype: FeatureDtype) -> dict[str, Any]:
    base = lookup("vitb16")
    tokens = 1 + (SHAPE.height // base.patch_size) * (SHAPE.width // base.patch_size)
    of_token = (
        base.embed_dim + 4 if dtype == "int8" else base.embed_dim * torch.empty(0, dtype=getattr(torch, dtype)).itemsize
    )
    whole = _cosines(runner, images, FeatureSpec(BOTH, dtype))
    pooled = _cosines(runner, images, FeatureSpec(BOTH[1:], dtype, POOLED))
    return {
        "dtype": dtype,
        "vitb_bytes": tokens * of_token,
        "least_cosine": float(whole.min()),
        "mean_cosine": float(whole.mean()),
        "pooled_least_cosine": float(pooled.min()),
        "pooled_mean_cosine": float(pooled.mean()),
        "tokens": len(whole),
    }


def _cosines(runner: TorchRunner, images: list[Tensor], spec: FeatureSpec) -> Tensor:
    """Return the cosine of every token with the same token in float32."""
    found = []
    for image in images:
        pairs = zip(_tokens(runner, image, spec), _tokens(runner, image, spec._replace(dtype="float32")), strict=True)
        found += [torch.cosine_similarity(sent, exact, dim=-1) for sent, exact in pairs]
    return torch.cat(found)


def _tokens(runner: TorchRunner, image: Tensor, spec: FeatureSpec) -> list[Tensor]:
    """Return the tokens of each output as a client reads them, [tokens, D]."""
    sections = run_image(runner, image, spec)
    if spec.dtype == "int8":
        pairs = zip(sections[::2], sections[1::2], strict=True)
        sections = [values * scales.unsqueeze(-1) for values, scales in pairs]
    return [values.double().reshape(-1, values.shape[-1]) for values in sections]


def _rounds(runner: TorchRunner, images: list[Tensor]) -> dict[str, float]:
    """Return the median seconds of a batch, by the name of its spec."""
    blocks = {name: Block.plan(runner.info, SHAPE, BATCH, spec) for name, spec in SPECS.items()}
    memory = mmap.mmap(-1, max(block.end for block in blocks.values()))
    memory[: BATCH * SHAPE.nbytes] = torch.stack(images).numpy().tobytes()
    runner.attach(ARENA, memoryview(memory))
    seconds: dict[str, list[float]] = {name: [] for name in SPECS}
    for _ in range(ROUNDS + 1):
        for name, block in blocks.items():
            rows = tuple(
                Row(ARENA, block.row_pixel_offset(i), block.row_output_offsets(i), block.spec) for i in range(BATCH)
            )
            started = time.perf_counter()
            finished = runner.finish(runner.launch(Batch(SHAPE, rows)))
            seconds[name].append(time.perf_counter() - started)
            assert all(finished.finite)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}  # the first is the warm-up
