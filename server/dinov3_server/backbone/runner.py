"""From settings to a model that is ready to serve: `build`."""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dinov3_server.backbone import cpu
from dinov3_server.backbone.checkpoint import Checkpoint, load_checkpoint
from dinov3_server.backbone.cpu_runner import CpuRunner
from dinov3_server.backbone.cuda_runner import CudaRunner
from dinov3_server.backbone.fingerprint import fingerprint
from dinov3_server.backbone.interface import Batch, FeatureDtype, FeatureSpec, ModelInfo, Output, PixelShape, Row
from dinov3_server.backbone.random_weights import random_tensors
from dinov3_server.backbone.registry import DATASETS, VitVariant, lookup
from dinov3_server.backbone.rope import default_periods
from dinov3_server.backbone.torch_runner import TORCH_DTYPES, TorchRunner
from dinov3_server.backbone.vit import VisionTransformer
from dinov3_server.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

WARM_UP = (PixelShape(256, 256, "uint8"), PixelShape(224, 224, "uint8"))
_WARM_UP_ARENA = -1


def build(
    model: str,
    weights: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int = 0,
    preprocessing: str = "",
    warm_up: Sequence[PixelShape] = WARM_UP,
) -> TorchRunner:
    """Load a model and run it once at each shape of `warm_up`.

    `model` is a name of registry.py; `weights` the path of a file, or `random:SEED`; `dtype` "auto", "float32" or
    "bfloat16"; `device` "cpu" or "cuda:N"; `threads` the CPU threads of one forward pass, 0 for as many as there are;
    `preprocessing` the identity of what makes pixels of images, for the fingerprint.

    Raises ConfigError or CheckpointError.
    """
    variant = lookup(model)
    torch_device = _device(device)
    compute_dtype = _dtype(dtype, torch_device)
    if threads < 0:
        raise ConfigError(f"threads is {threads}; it must be at least 1, or 0 for all that there are")
    if torch_device.type == "cpu":
        torch.set_num_threads(threads or cpu.available_threads())
    seconds: dict[str, float] = {}

    with _step(seconds, "read", f"{variant.name} from {weights}"):
        checkpoint, is_random = _weights(variant, weights)
    with _step(seconds, "fingerprint", "every tensor hashed"):
        identity = fingerprint(checkpoint, dtype=compute_dtype, preprocessing=preprocessing)
    with _step(seconds, "build", f"{compute_dtype} on {torch_device}"):
        transformer = VisionTransformer(
            variant,
            checkpoint.tensors,
            checkpoint.periods,
            checkpoint.dataset,
            dtype=TORCH_DTYPES[compute_dtype],
            device=torch_device,
        )
        info = ModelInfo(
            name=variant.name,
            weights=weights if is_random else Path(weights).name,
            random_weights=is_random,
            fingerprint=identity,
            dtype=compute_dtype,
            device=str(torch_device),
            layer_dims=variant.layer_dims,
            layer_strides=variant.layer_strides,
            registers=variant.registers,
            mean=checkpoint.dataset.mean,
            std=checkpoint.dataset.std,
            parameters=variant.parameters,
        )
        runner = (CudaRunner if torch_device.type == "cuda" else CpuRunner)(transformer, info)
    if torch_device.type == "cpu":
        cpu.keep_freed_memory()
    with _step(seconds, "warm_up", ", ".join(f"{shape.height}x{shape.width} {shape.format}" for shape in warm_up)):
        for shape in warm_up:
            _run_once(runner, shape)
    runner.load_seconds = seconds
    return runner


@contextmanager
def _step(seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    logger.info("load: %s took %.2f s (%s)", name, seconds[name], what)


def _device(device: str) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise ConfigError(f"device {device!r} is neither 'cpu' nor 'cuda:N'")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise ConfigError(f"device {device!r} is not there: torch {torch.__version__} sees {count} CUDA devices")
    return torch.device("cuda", int(index or 0))


def _dtype(dtype: str, device: torch.device) -> FeatureDtype:
    if dtype == "auto":
        return "bfloat16" if device.type == "cuda" or cpu.has_native_bf16() else "float32"
    if dtype == "float16":
        raise ConfigError("dtype 'float16': DINOv3 overflows in it (NaN features); use 'bfloat16' or 'float32'")
    if dtype == "float32":
        return "float32"
    if dtype != "bfloat16":
        raise ConfigError(f"dtype {dtype!r} is not one of 'auto', 'float32', 'bfloat16'")
    if device.type == "cpu" and not cpu.has_native_bf16():
        logger.warning("this CPU has no native bfloat16: it is emulated, and slower than float32")
    return "bfloat16"


def _weights(variant: VitVariant, weights: str) -> tuple[Checkpoint, bool]:
    """The checkpoint that `weights` names, and whether it is random."""
    kind, colon, seed = weights.partition(":")
    if kind == "random" and colon:
        if not (seed.isdecimal() and int(seed) < 1 << 63):
            raise ConfigError(f"weights {weights!r}: the seed must be a whole number below 2^63, as in 'random:0'")
        logger.warning("RANDOM WEIGHTS (%s): the features of %s mean nothing", weights, variant.name)
        tensors = random_tensors(variant, int(seed))
        periods = default_periods(variant.head_dim, variant.rope_base)
        return Checkpoint(variant, DATASETS["lvd1689m"], tensors, periods), True
    return load_checkpoint(Path(weights), variant), False


def _run_once(runner: TorchRunner, shape: PixelShape) -> None:
    """A grey image through the whole path of a batch. Raises CheckpointError where its features are not finite."""
    info = runner.info
    if shape.height % info.patch_size or shape.width % info.patch_size:
        raise ConfigError(f"warm-up at {shape.height}x{shape.width}: not multiples of {info.patch_size}")
    spec = FeatureSpec((Output("cls"), Output("registers"), Output("patches")), info.dtype)
    offsets = [0]
    for size in (shape.nbytes, *(info.output_nbytes(output, spec.dtype, shape) for output in spec.outputs)):
        offsets.append(offsets[-1] + size)
    arena = mmap.mmap(-1, offsets[-1])
    if shape.format == "uint8":
        arena[: shape.nbytes] = b"\x80" * shape.nbytes
    runner.attach(_WARM_UP_ARENA, memoryview(arena))
    try:
        row = Row(_WARM_UP_ARENA, pixels=0, outputs=tuple(offsets[1:-1]), spec=spec)
        finished = runner.finish(runner.launch(Batch(shape, (row,))))
    finally:
        runner.detach(_WARM_UP_ARENA)
    arena.close()
    if not all(finished.finite):
        raise CheckpointError(
            f"{info.name} gives NaN or infinite features for a grey {shape.height}x{shape.width} image with the "
            f"weights {info.weights!r}: the file is damaged, or does not belong to this model"
        )
