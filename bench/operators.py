"""The time of our forward pass by kind of operator: torch.profiler's self times on the CPU.

A batch through the runner, from the arena and back, as in `bare`; seeded random weights. After two batches as a
warm-up, BATCHES with the profiler and as many without, in turn. `ms` is the mean of a batch with the profiler,
`batch_ms` the median batch without.

Dense layers are identified by the shapes of their inputs and outputs; the operators of attention, RoPE, the patch
embedding and the gather of pixels by the calling function. `casts and copies` are those outside of these. `between
operators` is the time without an operator: Python, and the profiler itself.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bench.bare import Work, our_batch
from bench.record import table
from dinov3_server.backbone.runner import build
from dinov3_server.backbone.runners import cpu as cpu_runner
from dinov3_server.families.dinov3_vit import model as vit
from dinov3_server.families.dinov3_vit.variants import VITS, VitVariant
from dinov3_server.nn import attention
from dinov3_server.nn.linear import PackedLinear

CASES = (("vits16", 224), ("vitb16", 224), ("vits16", 512))
DTYPES = ("float32", "bfloat16")
IMAGES = 8
BATCHES = 5

# Functions whose operators are named after them: owner, attribute, name.
SCOPES: tuple[tuple[Any, str, str], ...] = (
    (vit, "attention", "attention"),
    (attention, "rotate_into", "RoPE"),
    (vit.VisionTransformer, "_embed", "patch embedding"),
    (cpu_runner.CpuRunner, "_gather", "gather"),
)
# Names of operators inside a scope, and outside of all scopes.
IN_SCOPE: Mapping[tuple[str, str], str] = {
    ("attention", "aten::bmm"): "attention: products",
    ("attention", "aten::mkldnn_convolution"): "attention: products",
    ("attention", "aten::_softmax"): "attention: softmax",
    ("attention", "aten::_scaled_dot_product_flash_attention_for_cpu"): "attention: fused kernel",
    ("attention", "aten::copy_"): "attention: copies",
}
ALONE: Mapping[str, str] = {
    "aten::native_layer_norm": "LayerNorm",
    "aten::amin": "finite check",
    "aten::amax": "finite check",
    "aten::copy_": "casts and copies",
    "aten::add": "residual additions",
    "aten::add_": "residual additions",
}
OTHER = "other operators"
BETWEEN = "between operators"


def measure() -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for (model, size), dtype in itertools.product(CASES, DTYPES):
        work = our_batch(build(model, "random:0", dtype=dtype, device="cpu"), size, IMAGES)
        times = operator_times(work, VITS[f"dinov3_{model}"], size)
        rows.append({"model": model, "dtype": dtype, "size": size, "batch": IMAGES, **times})
        print(rows[-1], flush=True)
    return {"rows": rows}


def show(result: dict[str, Any]) -> str:
    """Return a table with a line per operator, and ms and percent per case."""
    rows = result["rows"]
    titles = [f"{row['model']} {row['size']} {row['dtype']}" for row in rows]
    shares: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for kind, ms in row["ms"].items():
            shares[kind] += ms / sum(row["ms"].values())
    lines = [{"operator": kind} for kind in sorted(shares, key=lambda kind: -shares[kind])] + [
        {"operator": "batch, without the profiler"}
    ]
    for title, row in zip(titles, rows, strict=True):
        whole = sum(row["ms"].values())
        for line in lines[:-1]:
            ms = row["ms"].get(line["operator"], 0.0)
            line[title] = f"{ms:.1f} ms {ms / whole:4.0%}" if ms else ""
        lines[-1][title] = f"{row['batch_ms']:.1f} ms     "
    return table(lines, "operator", *titles)


def operator_times(work: Work, variant: VitVariant, size: int) -> dict[str, Any]:
    """Return `ms` of a batch by kind of operator, the largest first, and `batch_ms` of a batch without the profiler."""
    layers = dense_layers(variant, size)
    alone: list[float] = []
    ms: defaultdict[str, float] = defaultdict(float)
    work()
    work()
    for _ in range(BATCHES):
        alone.append(_seconds(work))
        # Without shapes: recording them makes fc1, and only fc1, take 1.5 times as long.
        with named_functions(layers), profile(activities=[ProfilerActivity.CPU]) as profiler:
            ms[BETWEEN] += _seconds(work) * 1e3 / BATCHES
        for event in profiler.events() or ():
            if not event.is_user_annotation:
                taken = event.self_cpu_time_total / 1e3 / BATCHES
                ms[kind_of(event)] += taken
                ms[BETWEEN] -= taken
    return {
        "batch_ms": round(statistics.median(alone) * 1e3, 2),
        "ms": {kind: round(ms[kind], 3) for kind in sorted(ms, key=lambda kind: -ms[kind])},
    }


def _seconds(work: Work) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


def dense_layers(variant: VitVariant, size: int) -> dict[tuple[int, int, int], str]:
    """Return the names of the dense layers of an MLP model, by (rows, input width, output width)."""
    width, hidden = variant.embed_dim, variant.ffn_dim
    patches = (size // variant.patch_size) ** 2
    tokens = IMAGES * (1 + variant.registers + patches)
    return {
        (IMAGES * patches, 3 * variant.patch_size**2, width): "linear: patch embedding",
        (tokens, width, 3 * width): "linear: qkv",
        (tokens, width, width): "linear: attention's projection",
        (tokens, width, hidden): "linear: fc1 and GELU",
        (tokens, hidden, width): "linear: fc2",
    }


def kind_of(event: FunctionEvent) -> str:
    scope = next((parent.name for parent in _parents(event) if parent.is_user_annotation), "")
    if scope:
        return IN_SCOPE.get((scope, event.name), scope if scope != "attention" else "attention: rest")
    return ALONE.get(event.name, OTHER)


def _parents(event: FunctionEvent) -> Iterator[FunctionEvent]:
    parent = event.cpu_parent
    while parent is not None:
        yield parent
        parent = parent.cpu_parent


@contextmanager
def named_functions(layers: Mapping[tuple[int, int, int], str]) -> Iterator[None]:
    """Let the profiler record the functions of SCOPES, and dense layers, by their names."""

    def named(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with record_function(name(*args)):
                return function(*args, **kwargs)

        return wrapper

    def layer(dense: PackedLinear, x: Tensor, *_: object) -> str:
        assert dense.bias is not None
        return layers[math.prod(x.shape[:-1]), x.shape[-1], len(dense.bias)]

    with ExitStack() as stack:
        for owner, attribute, name in SCOPES:
            scope = named(getattr(owner, attribute), lambda *_, name=name: name)
            stack.enter_context(mock.patch.object(owner, attribute, scope))
        for method in ("_unary", "_binary"):
            scope = named(getattr(PackedLinear, method), layer)
            stack.enter_context(mock.patch.object(PackedLinear, method, scope))
        yield
