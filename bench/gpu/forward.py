"""Forward passes alone: the matrix-product peak, our model eager and as a graph, compiled, and beside transformers."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu import models
from bench.gpu.plan import Config, Plan
from bench.gpu.timing import seconds_per_call, wait
from dinov3_server.families.dinov3_vit.model import VisionTransformer

Add = Callable[[dict[str, Any]], None]
Work = Callable[[], object]

PROFILED = 5  # forward passes
KERNELS = 15  # that take longest


@torch.inference_mode()
def peak(plan: Plan, add: Add) -> None:
    """Measure [m, k] x [n, k]^T products of random numbers in the model's dtype."""
    for m, n, k in plan.products:
        x = torch.randn(m, k, device=plan.device, dtype=plan.dtype)
        weight = torch.randn(n, k, device=plan.device, dtype=plan.dtype)
        out = torch.empty(m, n, device=plan.device, dtype=plan.dtype)
        product = functools.partial(torch.mm, x, weight.t(), out=out)
        seconds = seconds_per_call({"product": product}, plan.device, 3 * plan.seconds)["product"]
        add({"m": m, "n": n, "k": k, "teraflops": round(2 * m * n * k / seconds / 1e12, 3)})


@torch.inference_mode()
def forward(plan: Plan, add: Add) -> None:
    """Measure our model, eager and as a CUDA graph, in turn."""
    with _stream(plan):
        model = None
        for config in plan.forward:
            if model is None or model.variant != config.variant:
                model = None  # freed before the next one is made
                model = models.native_model(plan, config.variant)
            add(_row(plan, config, _ours(plan, models.eager(model), model, config, "eager", "graph")))
            _free(plan)


@torch.inference_mode()
def baselines(plan: Plan, add: Add) -> None:
    """Measure ours eager, as a graph, compiled, compiled and as a graph, and transformers eager and compiled, in turn.

    Variants that cannot be built here are in `absent`, with the reason.
    """
    with _stream(plan):
        for config in plan.baselines:
            add(_side_by_side(plan, config))
            torch.compiler.reset()
            _free(plan)


def _side_by_side(plan: Plan, config: Config) -> dict[str, Any]:
    model = models.native_model(plan, config.variant)
    works = _ours(plan, models.eager(model), model, config, "eager", "graph")
    absent: dict[str, str] = {}

    @contextlib.contextmanager
    def tried(name: str) -> Any:
        try:
            yield
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}"[:500]

    with models.fusible(model, config.size) as twin:
        with tried("compiled"):
            works |= _ours(plan, models.compiled(twin), model, config, "compiled", "compiled_graph")
        with tried("transformers"):
            theirs, floats = models.transformers_model(plan, config)
            works["transformers_eager"] = functools.partial(theirs, floats)
            with tried("transformers_compiled"):
                fast = functools.partial(torch.compile(theirs, dynamic=False), floats)
                fast()
                works["transformers_compiled"] = fast
        return {**_row(plan, config, works), "absent": absent}


@torch.inference_mode()
def profile(plan: Plan, add: Add) -> None:
    """Measure the device's time of a forward pass of the service's shape by kernel, eager and compiled."""
    config = plan.service
    model, pixels = models.native_model(plan, config.variant), models.bytes_for(plan, config)
    _profile(plan, add, "eager", functools.partial(models.eager(model), pixels))
    with models.fusible(model, config.size) as twin:
        _profile(plan, add, "compiled", functools.partial(models.compiled(twin), pixels))


def _profile(plan: Plan, add: Add, variant: str, work: Work) -> None:
    device = plan.device.type
    # On a GPU only its kernels: operators of the host would count them again.
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    for _ in range(3):
        work()
    wait(plan.device)
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(PROFILED):
            work()
        wait(plan.device)
    times = {
        event.key: (
            getattr(event, "self_device_time_total" if device == "cuda" else "self_cpu_time_total"),
            event.count,
        )
        for event in profiler.key_averages()
    }
    total = sum(microseconds for microseconds, _ in times.values())
    for kernel, (microseconds, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:KERNELS]:
        add(
            {
                "variant": variant,
                "kernel": kernel[:120],
                "calls": calls // PROFILED,
                "milliseconds": round(microseconds / PROFILED / 1e3, 4),
                "share": round(microseconds / total, 4),
            }
        )


def _ours(
    plan: Plan, run: models.Forward, model: VisionTransformer, config: Config, plain: str, graph: str
) -> dict[str, Work]:
    """Return works by name: `run` on its own pixels, and on a GPU also as a captured graph."""
    pixels = models.bytes_for(plan, config)
    works: dict[str, Work] = {plain: functools.partial(run, pixels)}
    run(pixels)
    if plan.device.type == "cuda":
        works[graph] = models.graph(run, model, pixels)
    return works


def _row(plan: Plan, config: Config, works: dict[str, Work]) -> dict[str, Any]:
    seconds = seconds_per_call(works, plan.device, plan.seconds)
    return {
        "model": config.model,
        "size": config.size,
        "batch": config.batch,
        "images_per_second": {name: round(config.batch / each, 1) for name, each in seconds.items()},
        "teraflops": {name: round(config.batch * config.flops / each / 1e12, 2) for name, each in seconds.items()},
    }


def _stream(plan: Plan) -> contextlib.AbstractContextManager[object]:
    """Return a stream that can be captured, unlike the default one."""
    if plan.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


def _free(plan: Plan) -> None:
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
