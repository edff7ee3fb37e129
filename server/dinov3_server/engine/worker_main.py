"""The worker process: build the runner and drive it until the supervisor ends it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

from dinov3_server.engine.channel import Channel
from dinov3_server.engine.messages import Ready, StartWorker
from dinov3_server.engine.worker import Worker
from dinov3_server.images.preprocess import PREPROCESSING_ID
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import PixelShape, Runner

log = logging.getLogger(__name__)


def serve(start: StartWorker, control: Channel) -> None:
    """Load the model, tell the supervisor that this worker is ready, and compute until told to stop."""
    settings = start.settings
    module, _, function = start.runner.partition(":")
    build: Callable[..., Runner] = getattr(importlib.import_module(module), function)
    runner = build(
        settings.model,
        start.provisioned.weights,
        dtype=settings.dtype,
        device=start.device,
        threads=settings.threads,
        preprocessing=PREPROCESSING_ID,
        warm_up=[PixelShape(height, width, "uint8") for height, width in settings.warm_up_sizes],
        dataset=settings.dataset,
        backbone=settings.backbone,
        provisioned=start.provisioned,
        parity_folder=str(settings.cache_folder / "parity") if settings.parity_check else None,
        projections=settings.projections,
    )
    metrics = Metrics()
    info = runner.info
    metrics.model_info.set(1, info.name, info.weights, info.fingerprint, info.dtype, info.device)
    for step, seconds in runner.load_seconds.items():
        metrics.model_load_seconds.set(seconds, step)
    metrics.device_busy_seconds.inc(info.device, value=0)
    metrics.late_device_seconds.inc(info.device, value=0)
    for proof in info.parity_check.outputs:
        if proof.dtype == info.dtype:
            metrics.parity_cosine.set(proof.least_cosine, proof.output)
    log.log(logging.INFO if info.parity_check.verified else logging.WARNING, "parity check: %s", info.parity_check)
    control.send(Ready(info))
    control.flush()
    Worker(runner, settings, control, metrics).run()
