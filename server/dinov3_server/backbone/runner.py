"""Builds a model that is ready to serve from the settings: `build`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch

from dinov3_server import host, malloc
from dinov3_server.backbone.parity.check import ParityInputs, checked_runner
from dinov3_server.backbone.parity.upstream import UpstreamModel
from dinov3_server.backbone.runners.base import TORCH_DTYPES, TorchRunner
from dinov3_server.backbone.runners.cpu import CpuRunner
from dinov3_server.backbone.runners.cuda import CudaRunner
from dinov3_server.backbone.runners.projections import read_projections
from dinov3_server.backbone.runners.self_test import run_image
from dinov3_server.backbone.weights.checkpoint import Checkpoint, load_checkpoint
from dinov3_server.backbone.weights.fingerprint import BACKBONE, fingerprint
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.config.types import without_secrets
from dinov3_server.errors import CheckpointError, ConfigError, UpstreamCodeError
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import (
    FeatureDtype,
    FeatureSpec,
    ModelInfo,
    Output,
    PixelShape,
    Provisioned,
    TokenKind,
)
from dinov3_server.models.variant import DATASETS, Variant
from dinov3_server.nn.model import Model

logger = logging.getLogger(__name__)

WARM_UP = (PixelShape(256, 256, "uint8"), PixelShape(224, 224, "uint8"))


def build(
    model: str,
    weights: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int = 0,
    preprocessing: str = "",
    warm_up: Sequence[PixelShape] = WARM_UP,
    dataset: str | None = None,
    backbone: str = "native",
    provisioned: Provisioned | None = None,
    parity_folder: str | None = None,
    projections: Iterable[tuple[str, str]] = (),
) -> TorchRunner:
    """Load a model, compare it with Meta's code, and run it once at each shape of `warm_up`.

    `model` is a name of families/registry.py; `weights` the path of a file, or `random:SEED`; `dtype` "auto", "float32"
    or "bfloat16"; `device` "cpu" or "cuda:N"; `threads` the CPU threads of one forward pass, 0 for all available;
    `preprocessing` the identity of the image preprocessing, for the fingerprint; `dataset` the training dataset of the
    weights, if known; `backbone` "native", or "reference" for Meta's own modules.

    `provisioned` has the path of Meta's code and the label of the weights. `parity_folder` is the folder of stored
    parity checks. Without it or Meta's code nothing is compared, and the model's parity check gives the reason.
    `projections` are names and files (runners/projections.py).

    Raises ConfigError, CheckpointError, UpstreamCodeError or ParityError.
    """
    variant = lookup(model)
    torch_device = _device(device)
    compute_dtype = _dtype(dtype, torch_device)
    if threads < 0:
        raise ConfigError(f"threads is {threads}; it must be at least 1, or 0 for all available")
    threads = threads or host.available_threads()
    if torch_device.type == "cpu":
        torch.set_num_threads(threads)
    checkout = None if backbone == "native" else _checkout(provisioned)
    maps = read_projections(projections, variant.layer_dims)  # before the slow steps
    for projection in maps:
        logger.info("projection %s: %d channels to %d, fingerprint %s", *astuple(projection))
    seconds: dict[str, float] = {}
    step = partial(_step, seconds)

    with step("read", f"{variant.name} from {without_secrets(weights)}"):
        checkpoint, is_random = _weights(variant, weights, dataset)
    with step("fingerprint", "every tensor hashed"):
        code = BACKBONE if provisioned is None or checkout is None else f"upstream-{provisioned.revision}"
        identity = fingerprint(checkpoint, dtype=compute_dtype, preprocessing=preprocessing, backbone=code)

    def load(dtype: FeatureDtype) -> TorchRunner:
        info = ModelInfo(
            name=variant.name,
            weights=provisioned.label if provisioned else weights if is_random else Path(weights).name,
            random_weights=is_random,
            fingerprint=identity,
            dtype=dtype,
            device=str(torch_device),
            layer_dims=variant.layer_dims,
            layer_strides=variant.layer_strides,
            register_tokens=checkpoint.variant.registers,
            mean=checkpoint.dataset.mean,
            std=checkpoint.dataset.std,
            parameters=checkpoint.variant.parameters,
            projections=tuple(maps),
        )
        if checkout is not None:
            network: Model = UpstreamModel(checkout, checkpoint, dtype=TORCH_DTYPES[dtype], device=torch_device)
        else:
            network = checkpoint.build(dtype=TORCH_DTYPES[dtype], device=torch_device)
        on_device = {projection.name: linear_map.to(torch_device) for projection, linear_map in maps.items()}
        return (CudaRunner if torch_device.type == "cuda" else CpuRunner)(network, info, on_device)

    inputs = ParityInputs(
        checkpoint,
        None if is_random else Path(weights),
        identity,
        compute_dtype,
        torch_device,
        threads,
        provisioned,
        None if parity_folder is None else Path(parity_folder),
    )
    runner = checked_runner(inputs, load, step)
    if torch_device.type == "cpu":
        malloc.keep_freed_memory()
    with step("warm_up", ", ".join(f"{shape.height}x{shape.width} {shape.format}" for shape in warm_up)):
        for shape in warm_up:
            _run_once(runner, shape)
    runner.load_seconds = seconds
    return runner


@contextmanager
def _step(seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    """Time and log a step of loading; add up steps of the same name."""
    started = time.perf_counter()
    yield
    elapsed = time.perf_counter() - started
    seconds[name] = seconds.get(name, 0.0) + elapsed
    logger.info("load: %s took %.2f s (%s)", name, elapsed, what)


def _device(device: str) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise ConfigError(f"device {device!r} is neither 'cpu' nor 'cuda:N'")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise ConfigError(f"device {device!r} is not available: torch {torch.__version__} sees {count} CUDA devices")
    return torch.device("cuda", int(index or 0))


def _dtype(dtype: str, device: torch.device) -> FeatureDtype:
    if dtype == "auto":
        return "bfloat16" if device.type == "cuda" or host.has_native_bf16() else "float32"
    if dtype == "float16":
        raise ConfigError("dtype 'float16': DINOv3 overflows in it (NaN features); use 'bfloat16' or 'float32'")
    if dtype == "float32":
        return "float32"
    if dtype != "bfloat16":
        raise ConfigError(f"dtype {dtype!r} is not one of 'auto', 'float32', 'bfloat16'")
    if device.type == "cpu" and not host.has_native_bf16():
        logger.warning("this CPU has no native bfloat16: it is emulated, and slower than float32")
    return "bfloat16"


def _weights(variant: Variant, weights: str, dataset: str | None) -> tuple[Checkpoint, bool]:
    """Return the checkpoint that `weights` names, and whether it is random."""
    kind, colon, seed = weights.partition(":")
    if kind == "random" and colon:
        if not (seed.isdecimal() and int(seed) < 1 << 63):
            raise ConfigError(f"weights {weights!r}: the seed must be a whole number below 2^63, as in 'random:0'")
        logger.warning("RANDOM WEIGHTS (%s): the features of %s mean nothing", weights, variant.name)
        tensors = random_tensors(variant, int(seed)) | variant.constants()
        return Checkpoint(variant, DATASETS["lvd1689m"], tensors), True
    return load_checkpoint(Path(weights), variant, dataset), False


def _checkout(provisioned: Provisioned | None) -> Path:
    """Return the folder of Meta's code, for --backbone reference. Raises UpstreamCodeError."""
    if provisioned is None or provisioned.checkout is None:
        reason = provisioned.unavailable_reason if provisioned else "nothing was provisioned"
        raise UpstreamCodeError(
            f"--backbone reference serves Meta's code, which is not available: {reason}. `dinov3-server vendor` "
            "fetches it; --backbone native does not need it"
        )
    return Path(provisioned.checkout)


def _run_once(runner: TorchRunner, shape: PixelShape) -> None:
    """Run a gray image through the whole path of a batch. Raises CheckpointError if its features are not finite."""
    info = runner.info
    if shape.height % info.patch_size or shape.width % info.patch_size:
        raise ConfigError(f"warm-up at {shape.height}x{shape.width}: not multiples of {info.patch_size}")
    kinds: tuple[TokenKind, ...] = ("cls", "registers", "patches") if info.register_tokens else ("cls", "patches")
    spec = FeatureSpec(tuple(map(Output, kinds)), info.dtype)
    if shape.format == "uint8":
        gray = torch.full((shape.height, shape.width, 3), 128, dtype=torch.uint8)
    else:
        gray = torch.zeros(3, shape.height, shape.width)
    if not all(bool(features.isfinite().all()) for features in run_image(runner, gray, spec)):
        raise CheckpointError(
            f"{info.name} gives NaN or infinite features for a gray {shape.height}x{shape.width} image with the "
            f"weights {info.weights!r}: the file is damaged, or does not belong to this model"
        )
