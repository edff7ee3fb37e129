"""What every result says of itself, and where it lies."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "transformers", "numpy", "pillow", "scikit-image", "grpcio", "protobuf")


def metadata() -> dict[str, Any]:
    """Hardware, versions, commit, command and date of this run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "bench", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD")
        + (" with changes" if _git("status", "--porcelain", "--", ".", ":!bench/results") else ""),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """`bench/results/NAME.json`, with the metadata of this run."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"metadata": metadata(), **result}, indent=1) + "\n")
    return path


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    return "\n".join(lines)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu() -> str:
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in named.get("flags", "").split()]
    return f"{named.get('model name', platform.machine())} ({', '.join(wide)})"
