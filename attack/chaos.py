"""Mixed traffic while processes are killed and stopped; no answer may be wrong or lost: `make chaos`.

A server with two frontends and one worker, in float32 with seeded random weights, gets requests of many callers at once
(attack/traffic.py, attack/jobs.py): a blocking client of four threads, an asyncio client of four tasks, plain gRPC,
calls with deadlines of 0.02 to 2 s, calls that are cancelled, streams, a stream that reads an answer every half second,
`dinov3-client extract` over 600 files again and again, and a training loop with `with_features`. Requests are one to
eight images of any format, size of model input and outputs; one image in eight is damaged. All callers run on the
server's cores.

Meanwhile a worker is killed (SIGKILL) every 20 seconds and a frontend every minute. Every 30 seconds a process is
stopped (SIGSTOP), alternately a worker and a frontend, for up to 5 seconds, and every third permanently: the supervisor
must detect that after 30 seconds, in which the process is not killed.

`asked` counts calls, messages of streams, files of the bulk run, and batches of training. Outcomes: `answered` with the
expected answer; `refused` with a status that asks to retry, which the clients do and the raw callers do not; `left` by
the caller; `wrong`, if a tensor of a row differs by more than 1e-5 (relative, float32) from the answer of the same
server before the disturbances, or a valid image failed, or a damaged one did not; `lost`, if there is no answer within
120 s of retries, or another status. A bulk run that ends early because the server was away or busy for 120 s counts as
refused once and is started again, as its message says; the third early end is a loss. `refused_by_server` has the
server's own counts since its start, by reason, without those of the last second of killed processes. `peak_mib` is the
most memory of all processes (PSS).

The exit code is 1 if anything is wrong or lost, if the server does not recover, or if its log has a traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any

import psutil

from attack import jobs, watch
from attack.outcomes import COLUMNS, OUTCOMES, Outcomes
from attack.questions import differs, draw
from attack.traffic import DEADLINE, Traffic
from bench.record import table, write
from bench.server import Server, serving, total_pss
from dinov3_client import Client

SECONDS = 300.0
QUESTIONS = 100
THREADS = 4
FLAGS = ("--weights", "random:0", "--dtype", "float32", "--frontends", "2", "--warm-up-sizes", "none")


@dataclass(frozen=True)
class Rhythm:
    """Seconds between two disturbances of each kind, and the longest stop."""

    worker_kill: float = 20.0
    frontend_kill: float = 60.0
    stop: float = 30.0
    longest_stop: float = 5.0


@dataclass
class Result:
    """The result of a run. `faults` are those of the server as a whole."""

    outcomes: Outcomes = field(default_factory=Outcomes)
    seconds: float = 0.0
    done: Counter[str] = field(default_factory=Counter)
    """Disturbances by name."""
    refused_by_server: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.faults and not self.outcomes.count("wrong") and not self.outcomes.count("lost")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m attack chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"({SECONDS:g})")
    parser.add_argument("--model", default="vits16", help="(vits16)")
    parser.add_argument("--seed", type=int, default=0, help="of questions, callers and disturbances (0)")
    given = parser.parse_args(arguments)
    logging.getLogger("dinov3_client").setLevel(logging.ERROR)  # no warnings about retries
    result = chaos("dinov3_server", ("--model", given.model, *FLAGS), given.seconds, given.seed)
    recorded = {"model": given.model, "seed": given.seed, **record(result)}
    print(show(recorded))
    print("recorded in", write("chaos", __doc__ or "", recorded))
    return 0 if result.good else 1


def chaos(
    module: str, flags: Sequence[str], seconds: float, seed: int, rhythm: Rhythm = Rhythm(), files: int = jobs.FILES
) -> Result:
    result = Result()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as lines, serving(*flags, module=module, log=lines) as server:
            _storm(server, result, seconds, seed, rhythm, files)
        result.faults += [f"the log says: {line}" for line in watch.wrong_lines(log)]
    return result


def record(result: Result) -> dict[str, Any]:
    return {
        "seconds": round(result.seconds),
        "done": dict(result.done),
        "rows": result.outcomes.rows(),
        "refusals": dict(result.outcomes.reasons.most_common()),
        "refused_by_server": result.refused_by_server,
        "peak_mib": result.peak >> 20,
        "notes": result.outcomes.notes,
        "faults": result.faults,
    }


def show(recorded: dict[str, Any]) -> str:
    counts = [
        f"{title}: " + (", ".join(f"{count} x {name}" for name, count in recorded[key].items()) or "nothing")
        for title, key in (
            ("disturbances", "done"),
            ("refusals, as raw callers saw them", "refusals"),
            ("refusals, as the server counted them", "refused_by_server"),
        )
    ]
    notes = [f"{outcome.upper()}: {note}" for outcome, notes in recorded["notes"].items() for note in notes]
    return "\n".join(
        [
            f"{recorded['seconds']} seconds; all processes had at most {recorded['peak_mib']} MiB (PSS)",
            table(recorded["rows"], *COLUMNS),
            *counts,
            *notes,
            *(f"FAULT: {fault}" for fault in recorded["faults"]),
        ]
    )


def _storm(server: Server, result: Result, seconds: float, seed: int, rhythm: Rhythm, files: int) -> None:
    def rng(name: str) -> random.Random:
        return random.Random(f"{seed} {name}")

    with Client(server.grpc, deadline=DEADLINE) as client:
        depth = client.model().depth
        questions = [draw(rng(f"question {number}"), depth=depth) for number in range(QUESTIONS)]
        photos, crops = jobs.draw_photos(rng("photos"), client, files), jobs.draw_crops(rng("crops"), client)
        known = [(question, question.ask(client)) for question in questions]
        print(f"{len(known)} questions answered undisturbed", flush=True)

        traffic = Traffic(server.grpc, known, result.outcomes, threading.Event())
        callers: list[Callable[[], None]] = [
            *(partial(traffic.blocking, rng(f"client {number}"), client) for number in range(THREADS)),
            partial(traffic.awaiting, rng("async client"), THREADS),
            partial(traffic.raw, rng("raw")),
            partial(traffic.impatient, rng("impatient")),
            partial(traffic.cancelling, rng("cancelling")),
            partial(traffic.streaming, rng("streaming")),
            partial(traffic.reading_slowly, rng("slow")),
            partial(jobs.extract_in_bulk, traffic, photos),
            partial(jobs.train, traffic, rng("training"), client, crops),
        ]
        threads = [threading.Thread(target=_noting, args=(call, result.faults)) for call in callers]
        since = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            _disturb(server, result, rng("disturb"), rhythm, seconds)
        finally:
            traffic.stop.set()
            for thread in threads:
                thread.join(2 * DEADLINE)
        result.faults += ["a caller hangs" for thread in threads if thread.is_alive()]
        result.seconds = time.monotonic() - since
        result.faults += [why for question, truth in known[:5] if (why := differs(truth, question.ask(client)))]
    if not watch.settled(lambda: not watch.busy_gauges(server)):
        result.faults.append(f"not zero although the server is idle: {watch.busy_gauges(server)}")
    result.refused_by_server = {
        name[1]: int(count) for name, count in server.metrics().items() if name[0] == "dinov3_refused_requests_total"
    }


def _noting(call: Callable[[], None], faults: list[str]) -> None:
    """Run a caller, and record an exception as a fault: its missing answers would not be noticed otherwise."""
    try:
        call()
    except Exception as error:
        faults.append(f"a caller failed: {type(error).__name__}: {error}")


def _disturb(server: Server, result: Result, rng: random.Random, rhythm: Rhythm, seconds: float) -> None:
    began = reported = time.monotonic()
    next_kill = {"worker": began + rhythm.worker_kill, "frontend": began + rhythm.frontend_kill}
    next_stop, stops = began + rhythm.stop, 0
    stopped: dict[int, float] = {}  # when each process is continued
    while (now := time.monotonic()) < began + seconds:
        for pid, until in list(stopped.items()):
            if now >= until:
                del stopped[pid]
                _signal(pid, SIGCONT)
        for role, after in (("worker", rhythm.worker_kill), ("frontend", rhythm.frontend_kill)):
            if now >= next_kill[role]:
                next_kill[role] += after
                if victims := [pid for pid in _pids(server, role) if pid not in stopped]:
                    result.done[f"{role} killed"] += _signal(rng.choice(victims), SIGKILL)
        if now >= next_stop:
            next_stop += rhythm.stop
            stops += 1
            role = "worker" if stops % 2 else "frontend"
            if victims := [pid for pid in _pids(server, role) if pid not in stopped]:
                pid = rng.choice(victims)
                stopped[pid] = float("inf") if stops % 3 == 0 else now + rng.uniform(0.1, rhythm.longest_stop)
                result.done[f"{role} stopped" + (" permanently" if stops % 3 == 0 else "")] += _signal(pid, SIGSTOP)
        result.peak = max(result.peak, total_pss(server.process))
        if now - reported >= 10:
            reported = now
            counts = ", ".join(f"{result.outcomes.count(outcome)} {outcome}" for outcome in OUTCOMES)
            print(f"  {now - began:.0f} s: {counts}", flush=True)
        time.sleep(0.2)
    for pid in stopped:
        _signal(pid, SIGCONT)


def _pids(server: Server, role: str) -> list[int]:
    """Return the pids of the living processes of this role."""
    found = []
    for child in server.process.children():
        with suppress(psutil.Error):
            if role in child.cmdline():
                found.append(child.pid)
    return sorted(found)


def _signal(pid: int, number: int) -> bool:
    """Send a signal. Return whether the process exists."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
