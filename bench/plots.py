"""Draw SVGs of the recorded results: `python -m bench plots` reads bench/results and writes docs/plots.

Every run of a benchmark draws them too. The same records give the same bytes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.record import RESULTS, ROOT

PLOTS = ROOT / "docs" / "plots"
Record = Mapping[str, Any]

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "dinov3-serving",  # the ids of elements, random otherwise
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
# Okabe and Ito's color-blind safe colors, and grays.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#444444", "#888888")
REST = "#cccccc"
MARKERS = "osD^vP*X"
SERVERS = {
    "ours": "dinov3-serving",
    "naive": "naive gRPC server",
    "pytriton": "PyTriton",
    "pytriton_float32": "PyTriton, float32 in and out",
}
BASELINES = {"eager": "transformers", "compiled": "transformers, compiled", "upstream": "Meta's own code"}
SMALL = 0.03
"""Operators whose share is at most this in every bar are added to the rest."""


def draw(results: Path = RESULTS, plots: Path = PLOTS) -> list[Path]:
    """Draw every figure of FIGURES whose record exists, report the others, and return the written files."""
    plots.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (record, figure) in FIGURES.items():
        source = results / f"{record}.json"
        if not source.is_file():
            print(f"no plot {name}: there is no {source.name}; `python -m bench {record}` records it", flush=True)
            continue
        with mpl.rc_context(STYLE):
            try:
                drawn = figure(json.loads(source.read_text()))
            except KeyError as error:
                print(f"no plot {name}: {source.name} has no {error}; `python -m bench {record}` records it anew")
                continue
            path = plots / f"{name}.svg"
            drawn.savefig(path, metadata={"Date": None, "Creator": None})
        written.append(path)
    return written


def baselines_throughput(record: Record) -> Figure:
    figure, axes = _one_axes()
    for server, rows in _grouped(record["rows"], "server").items():
        points = {level: _median(group, "images_per_second") for level, group in _grouped(rows, "in_flight").items()}
        _line(axes, points, list(SERVERS).index(server), SERVERS[server])
    _throughput_axes(axes, sorted({row["in_flight"] for row in record["rows"]}))
    axes.set_title(f"ViT-S/16, {record['dtype']}, CPU: one 224x224 image a request, CLS and patches back")
    return figure


def service_throughput(record: Record) -> Figure:
    figure, axes = _one_axes()
    for index, (requests, rows) in enumerate(_grouped(record["rows"], "requests").items()):
        _line(axes, {row["in_flight"]: row["images_per_second"] for row in rows}, index, requests)
    _throughput_axes(axes, sorted({row["in_flight"] for row in record["rows"]}))
    axes.set_title("ViT-S/16, CPU: by what a request brings and asks for")
    return figure


def baselines_latency(record: Record) -> Figure:
    """Draw a bar from the median to the 99th percentile for each server and each number of requests in flight."""
    figure, axes = _one_axes()
    servers = _grouped(record["rows"], "server")
    levels = sorted({row["in_flight"] for row in record["rows"]})
    for index, (server, rows) in enumerate(servers.items()):
        color = COLORS[list(SERVERS).index(server)]
        offset = 0.18 * (index - (len(servers) - 1) / 2)
        for level, group in _grouped(rows, "in_flight").items():
            x = levels.index(level) + offset
            median, high = _median(group, "p50_ms"), _median(group, "p99_ms")
            axes.plot([x, x], [median, high], color=color, linewidth=3, solid_capstyle="butt")
            axes.plot(x, median, "o", color=color, markersize=6, label=SERVERS[server] if level == levels[0] else None)
            axes.plot(x, high, "_", color=color, markersize=9, markeredgewidth=2)
            axes.annotate(f"{median:.0f}", (x, median), (0, -7), textcoords="offset points", ha="center", va="top")
    axes.set_yscale("log")
    axes.margins(y=0.14)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(levels)), [str(level) for level in levels])
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("latency, ms: p50 (dot) to p99 (dash)")
    axes.set_title(f"ViT-S/16, {record['dtype']}, CPU: one 224x224 image a request, CLS and patches back")
    axes.legend(loc="upper left")
    return figure


def service_stages(record: Record) -> Figure:
    """Draw the stages of an image (of a batch, the image's part), and beside them its wait in the queue."""
    rows = [row["stage_ms"] for row in record["rows"]]
    names = [f"{row['requests']}, {row['in_flight']} in flight" for row in record["rows"]]
    figure = Figure(figsize=(9, 0.36 * len(rows) + 1.5), layout="constrained")
    work, queue = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    colors = {
        "decode": "#E69F00", "copy_in": "#56B4E9", "forward": "#0072B2", "copy_out": "#009E73", "respond": "#CC79A7"
    }  # fmt: skip
    _shares(work, names, [{stage: row[stage] for stage in colors} for row in rows], colors)
    work.set_xlabel("share of the server's work for an image")
    waits = [row["queue"] for row in rows]
    queue.barh(range(len(rows)), waits, color=REST, height=0.72)
    for i, wait in enumerate(waits):
        queue.annotate(f"{wait:.3g}", (wait, i), (3, 0), textcoords="offset points", va="center", size=8)
    queue.margins(x=0.12)
    queue.grid(axis="y", visible=False)
    queue.set_xlabel("wait in the queue, ms")
    handles, labels = work.get_legend_handles_labels()
    figure.legend(handles, [label.replace("_", " ") for label in labels], loc="outside upper center", ncols=len(labels))
    return figure


def operator_shares(record: Record) -> Figure:
    rows = [row["ms"] for row in record["rows"]]
    names = [f"{row['model']}, {row['size']} px, {row['dtype']}" for row in record["rows"]]
    shares = [{kind: ms / sum(row.values()) for kind, ms in row.items()} for row in rows]
    large = dict.fromkeys(kind for row in shares for kind, share in row.items() if share > SMALL)
    order = sorted(large, key=lambda kind: -sum(row.get(kind, 0) for row in shares))
    order.sort(key=lambda kind: ("linear", "attention").index(kind.split(":")[0]) if ":" in kind else 2)
    bars = [
        {kind: row.get(kind, 0.0) for kind in order} | {"rest": sum(v for k, v in row.items() if k not in large)}
        for row in rows
    ]
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.9), layout="constrained")
    axes = figure.subplots()
    tones = {"linear": iter(mpl.colormaps["Blues_r"]([0.1, 0.25, 0.4, 0.55, 0.7])),
             "attention": iter(mpl.colormaps["Oranges_r"]([0.25, 0.4, 0.55, 0.7, 0.8]))}  # fmt: skip
    others = iter(("#009E73", "#CC79A7", "#F0E442", "#444444", "#888888"))
    colors = {kind: next(tones.get(kind.split(":")[0], others), REST) for kind in order} | {"rest": REST}
    _shares(axes, names, bars, colors)
    axes.set_xlabel("share of a forward pass, batches of 8")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def bare_ratios(record: Record) -> Figure:
    groups = _grouped(record["rows"], "model", "dtype")
    figure = Figure(figsize=(2.4 * len(groups) + 1, 3.6), layout="constrained")
    grid = figure.subplots(1, len(groups), sharey=True, squeeze=False)
    for axes, ((model, dtype), rows) in zip(grid[0], groups.items(), strict=True):
        axes.axhline(1, color="#444444", linewidth=1)
        for index, (baseline, name) in enumerate(BASELINES.items()):
            if baseline not in record["absent"]:
                ratios = [row.get(f"ours/{baseline}", math.nan) for row in rows]
                axes.plot(ratios, MARKERS[index], color=COLORS[index + 1], markersize=5, label=name)
        axes.set_xticks(
            range(len(rows)), [f"{row['size']} px, {row['batch']}" for row in rows], rotation=60, ha="right"
        )
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_title(f"{model}, {dtype}")
        axes.grid(axis="x", visible=False)
    # After drawing all of them: they share the axis, and a limit that is set stops autoscaling.
    grid[0][0].set_ylim(0, 1.05 * grid[0][0].get_ylim()[1])
    grid[0][0].set_ylabel("our images/s over the baseline's")
    figure.supxlabel("image size and batch", fontsize=9)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _one_axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    return figure, figure.subplots()


def _line(axes: Axes, points: Mapping[int, float], index: int, label: str) -> None:
    axes.plot(list(points), list(points.values()), MARKERS[index] + "-", color=COLORS[index], label=label)


def _throughput_axes(axes: Axes, levels: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("images/s")
    axes.legend(loc="lower right")


def _shares(axes: Axes, names: Sequence[str], rows: Sequence[Mapping[str, float]], colors: Mapping[str, Any]) -> None:
    """Draw one bar per row, from the top: each kind's share of the row's sum, labeled if there is room."""
    left = [0.0] * len(rows)
    for kind, color in colors.items():
        shares = [row.get(kind, 0.0) / sum(row.values()) for row in rows]
        if not any(shares):
            continue
        axes.barh(range(len(rows)), shares, left=left, color=color, label=kind, height=0.72)
        dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), to_rgb(color), strict=True)) < 0.55
        for i, share in enumerate(shares):
            if share > 1.5 * SMALL:
                x = left[i] + share / 2
                axes.text(x, i, f"{share:.0%}", ha="center", va="center", size=8, color="white" if dark else "black")
            left[i] += share
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", visible=False)


def _grouped(rows: Sequence[Record], *keys: str) -> dict[Any, list[Record]]:
    """Group rows by the value of a key, or by the values of several."""
    groups: dict[Any, list[Record]] = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return groups


def _median(rows: Sequence[Record], figure: str) -> float:
    return float(statistics.median(row[figure] for row in rows))


FIGURES: dict[str, tuple[str, Callable[[Record], Figure]]] = {
    "baselines-throughput": ("baselines", baselines_throughput),
    "baselines-latency": ("baselines", baselines_latency),
    "service-throughput": ("service", service_throughput),
    "service-stages": ("service", service_stages),
    "bare-ratios": ("bare", bare_ratios),
    "operators": ("operators", operator_shares),
}
"""By file name: the record to read, and the function that draws it."""
