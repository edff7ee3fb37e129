"""The differences between our presets and upstream's transforms on real photos, in pixels and features, and their cost.

Upstream's transform of the DINOv3 README is torchvision's Resize of a uint8 tensor, and that is
`torch.nn.functional.interpolate(mode="bilinear", antialias=True)`: on uint8 itself if the CPU has AVX2, else in
float32, rounded afterwards. Both are measured, the former in both memory layouts that occur. transformers' processor
resizes in float32 and does not round.

Features are of transformers' DINOv3ViTModel, ViT-S/16, in float32, with seeded random weights (q and k of standard
deviation 0.08, so that attention is not uniform; other weights 0.02; LayerScale 0.5).
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from bench.record import table
from bench.requests import encoded
from dinov3_server.images.decode import File
from dinov3_server.images.preprocess import PREPROCESSING_ID, PRESETS, transform_into
from dinov3_serving.images import Transform

# The photos in scikit-image's wheel; its other data would be downloaded.
PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
MAX_PIXELS = 100_000_000

Resize = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]


def interpolate(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


# [3, H, W] uint8 to [3, h, w], uint8 or float32 in 0..255.
UPSTREAM: dict[str, dict[str, Resize]] = {
    "dinov3": {
        "uint8, channels last": lambda pixels, size: interpolate(pixels, size),
        "uint8, contiguous": lambda pixels, size: interpolate(pixels.contiguous(), size),
        "float32, rounded": lambda pixels, size: interpolate(pixels.float(), size).round().to(torch.uint8),
    },
    "hf": {"float32, not rounded": lambda pixels, size: interpolate(pixels.float(), size)},
}


def photos() -> dict[str, bytes]:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        sys.exit("scikit-image is not installed: pip install 'dinov3-serving[dev]'")
    folder = Path(package.origin).parent / "data"
    return {name: (folder / name).read_bytes() for name in PHOTOS}


def ours(data: bytes, transform: Transform) -> torch.Tensor:
    """Decode and transform a file as for a request. Return [3, h, w] uint8."""
    assert transform.size is not None
    out = bytearray(transform.size[0] * transform.size[1] * 3)
    image = File(data, MAX_PIXELS).decode()
    transform_into(image, transform, memoryview(out))
    return torch.frombuffer(out, dtype=torch.uint8).view(*transform.size, 3).permute(2, 0, 1)


def full_size(data: bytes) -> torch.Tensor:
    """Decode a file. Return [3, H, W] uint8, channels last in memory, as torchvision converts a PIL image."""
    image = File(data, MAX_PIXELS).decode()
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_model() -> DINOv3ViTModel:
    model = DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=4)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "layer_scale" in name:
                parameter.fill_(0.5)
            elif "norm" not in name:
                sharp = "q_proj.weight" in name or "k_proj.weight" in name
                parameter.normal_(0, 0.08 if sharp else 0.02, generator=generator)
    return model


@torch.inference_mode()
def features(model: DINOv3ViTModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return CLS [384] and patches [P, 384] of pixels [3, h, w] in 0..255."""
    tokens = model(((pixels.float() / 255 - MEAN) / STD)[None])
    return tokens.last_hidden_state[0, 0], tokens.last_hidden_state[0, 5:]


def cosine(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(mine.double(), theirs.double(), dim=-1)


def fidelity(model: DINOv3ViTModel, files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Return a row for each preset, photo and reference."""
    rows = []
    # For comparison: the difference between another filter and the same reference.
    bicubic = replace(PRESETS["dinov3"], interpolation="bicubic")
    cases = [
        ("dinov3", PRESETS["dinov3"], UPSTREAM["dinov3"]),
        ("dinov3 but bicubic", bicubic, {"uint8, channels last": UPSTREAM["dinov3"]["uint8, channels last"]}),
        ("hf", PRESETS["hf"], UPSTREAM["hf"]),
    ]
    for preset, transform, references in cases:
        assert transform.size is not None
        for photo, data in files.items():
            mine, source = ours(data, transform), full_size(data)
            cls, patches = features(model, mine)
            for reference, resize in references.items():
                theirs = resize(source, transform.size)
                difference = (mine.double() - theirs.double()).abs()
                their_cls, their_patches = features(model, theirs)
                by_patch = cosine(patches, their_patches)
                rows.append(
                    {
                        "preset": preset,
                        "reference": reference,
                        "photo": photo,
                        "height_width": list(source.shape[1:]),
                        "max_level_difference": float(difference.max()),
                        "mean_level_difference": float(difference.mean()),
                        "share_of_values_that_differ": float((difference > 0).double().mean()),
                        "cls_cosine": float(cosine(cls, their_cls)),
                        "patch_cosine_mean": float(by_patch.mean()),
                        "patch_cosine_min": float(by_patch.min()),
                    }
                )
    return rows


def jpeg_640x480(files: dict[str, bytes]) -> bytes:
    image = File(files["motorcycle_left.png"], MAX_PIXELS).decode()
    return encoded(image.crop((0, 0, 640, 480)), "JPEG", quality=90)


def milliseconds(work: Callable[[], object], repeats: int = 300) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return {"median": round(statistics.median(times), 3), "best": round(min(times), 3)}


def cost(files: dict[str, bytes]) -> dict[str, Any]:
    """Measure decoding and transforming with one thread, in milliseconds."""
    data = jpeg_640x480(files)
    image = File(data, MAX_PIXELS).decode()
    out = memoryview(bytearray(256 * 256 * 3))
    return {
        "file": f"640x480 JPEG, quality 90, 4:2:0, {len(data)} bytes (motorcycle_left.png, cropped)",
        "decode": milliseconds(lambda: File(data, MAX_PIXELS).decode()),
        "transform_into, preset dinov3": milliseconds(lambda: transform_into(image, PRESETS["dinov3"], out)),
    }


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the worst and the mean over all photos, by preset and reference."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["preset"], row["reference"]), []).append(row)
    return [
        {
            "preset": preset,
            "reference": reference,
            "photos": len(group),
            "max_level_difference": max(row["max_level_difference"] for row in group),
            "mean_level_difference": statistics.mean(row["mean_level_difference"] for row in group),
            "share_of_values_that_differ": statistics.mean(row["share_of_values_that_differ"] for row in group),
            "cls_cosine_min": min(row["cls_cosine"] for row in group),
            "patch_cosine_mean": statistics.mean(row["patch_cosine_mean"] for row in group),
            "patch_cosine_min": min(row["patch_cosine_min"] for row in group),
        }
        for (preset, reference), group in groups.items()
    ]


def measure() -> dict[str, Any]:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    files = photos()
    rows = fidelity(random_model(), files)
    return {
        "preprocessing": PREPROCESSING_ID,
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "summary": summary(rows),
        "milliseconds": cost(files),
        "photos": rows,
    }


def show(result: dict[str, Any]) -> str:
    columns = ("preset", "reference", "max_level_difference", "cls_cosine_min", "patch_cosine_mean", "patch_cosine_min")
    return table(result["summary"], *columns)
