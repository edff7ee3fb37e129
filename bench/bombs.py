"""Memory of a server that is attacked, under a limit of the size that the formula of docs/deployment.md gives.

The whole server (default limits, two frontends, a token file) meets one bomb after the other (bench/attackers.py),
while a client with another token sends an image 20 times a second. It is run twice: with the instant runner of
bench/instant.py, which makes the frontends answer as fast as they can, and with ViT-S/16 (seeded random weights).

Where this process may make a control group with a memory limit, the server runs in one whose limit is the formula
(`limit_mb`): if it needed more, the kernel would end a process of it (`kills`). `peak_mb` is the most memory that the
kernel cannot reclaim, read 20 times a second from the start of a bomb until 6 s after its end: anonymous memory,
arenas, the kernel's own memory for the processes, buffers of sockets. Elsewhere it is the PSS of all processes.
`after_mb` is the last.

`answers` are the bomb's calls by status; of calls that are held open, `ended` were ended by the server. `asked` and
`lost` are the calls of the other client, after its retries; `longest_s` is its longest wait. `lag_ms` is the longest
delay of the frontends' event loops, as the upper bound of its bucket (dinov3_event_loop_lag_seconds).
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.attackers import BOMBS, MB, Bomb, Target
from bench.memory_limit import MemoryLimit, memory_limit
from bench.record import table
from bench.requests import random_pixels
from bench.server import Server, quantile_ms, serving, total_pss
from dinov3_client import Client, Dinov3Error

# The defaults of arena_bytes, frontend_bytes, max_message_bytes; docs/deployment.md has the rest.
ARENA, FRONTEND, MESSAGE, OWN, SUPERVISOR = 512, 1024, 128, 192, 64
FRONTENDS = 2
RUNS = (("instant", "bench.instant", 64), ("vits16", "dinov3_server", 940))  # runner, module, MB of its worker
DEPTH = 12
REST_SECONDS = 6.0  # after a bomb
INTERVAL_SECONDS = 0.05


def measure(runs: tuple[tuple[str, str, int], ...] = RUNS, bombs: dict[str, Bomb] = BOMBS) -> dict[str, Any]:
    return {"runs": [_run(*run, bombs) for run in runs]}


def show(result: dict[str, Any]) -> str:
    rows = [{"runner": run["runner"], **row} for run in result["runs"] for row in run["rows"]]
    columns = ("bomb", "peak_mb", "after_mb", "lag_ms", "kills", "asked", "lost", "longest_s", "answers")
    heads = [
        f"{run['runner']}: limit {run['limit_mb']} MB ({run['measured']}), peak {run['peak_mb']} MB"
        for run in result["runs"]
    ]
    return "\n".join([*heads, table(rows, "runner", *columns)])


def _run(runner: str, module: str, worker: int, bombs: dict[str, Bomb]) -> dict[str, Any]:
    limit_mb = FRONTENDS * (ARENA + FRONTEND + 2 * MESSAGE + OWN) + worker + SUPERVISOR
    with tempfile.TemporaryDirectory() as folder, memory_limit(limit_mb * MB) as limit:
        tokens = Path(folder) / "tokens"
        tokens.write_text("bomb\npolite\n")
        flags = (
            "--model",
            "vits16",
            "--weights",
            "random:0",
            "--frontends",
            str(FRONTENDS),
            "--token-file",
            str(tokens),
        )
        with serving(*flags, module=module, limit=limit) as server:
            rows = [_throw(server, limit, name, bomb) for name, bomb in bombs.items()]
    return {
        "runner": runner,
        "measured": f"control group v{limit.version}" if limit else "PSS",
        "limit_mb": limit_mb,
        "peak_mb": max(row["peak_mb"] for row in rows),
        "rows": rows,
    }


class _Sampler:
    """Measures the memory of a server 20 times a second."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._end = threading.Event()
        self.first = self.last = self.peak = read()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(INTERVAL_SECONDS):
            self.last = self._read()
            self.peak = max(self.peak, self.last)


def _throw(server: Server, limit: MemoryLimit | None, name: str, bomb: Bomb) -> dict[str, Any]:
    async def throw() -> Counter[str]:
        answers = await bomb(Target(server.grpc, server.http, DEPTH))
        await asyncio.sleep(REST_SECONDS)
        return answers

    sampler = _Sampler(limit.used if limit else lambda: total_pss(server.process))
    kills, before = limit.kills() if limit else 0, server.metrics()
    with _polite_client(server.grpc) as polite:
        answers = asyncio.run(throw())
    sampler.end()
    grown = {key: value - before.get(key, 0.0) for key, value in server.metrics().items()}
    row = {
        "bomb": name,
        "before_mb": sampler.first // MB,
        "peak_mb": sampler.peak // MB,
        "after_mb": sampler.last // MB,
        "lag_ms": quantile_ms(grown, "dinov3_event_loop_lag_seconds", 1.0),
        "kills": limit.kills() - kills if limit else None,
        **polite,
        "answers": " ".join(f"{code}:{count}" for code, count in sorted(answers.items())),
    }
    print(row, flush=True)
    return row


@contextmanager
def _polite_client(address: str) -> Iterator[dict[str, float]]:
    """Run another client in a process of its own until the end of the block, and then yield its figures."""
    context = get_context("spawn")
    figures: dict[str, float] = {}
    with context.Manager() as manager, ProcessPoolExecutor(1, context) as pool:
        over = manager.Event()
        running = pool.submit(_ask, address, over)
        try:
            yield figures
        finally:
            over.set()
            figures.update(running.result())


def _ask(address: str, over: threading.Event) -> dict[str, float]:
    asked = lost = 0
    longest = 0.0
    image = random_pixels(1, 64)

    def one() -> None:
        nonlocal lost, longest
        began = time.monotonic()
        try:
            client.extract(image, preset="none")
        except Dinov3Error as error:
            lost += 1
            print(f"lost: {error}", file=sys.stderr)
        longest = max(longest, time.monotonic() - began)

    with Client(address, token="polite") as client, ThreadPoolExecutor(32) as pool:
        while not over.wait(INTERVAL_SECONDS):
            asked += 1
            pool.submit(one)
    return {"asked": asked, "lost": lost, "longest_s": round(longest, 2)}
