"""Send many inputs, most of them damaged, to a server, and report faults: `make fuzz`.

Two runs, each with its own server that requires a token: INPUTS to a runner that answers instantly (bench/instant.py),
and MODEL_INPUTS to ViT-S/16 with random weights. The inputs are those of attack/messages.py and attack/images.py, from
GENERATORS processes over several connections each; a seed always gives the same inputs.

The exit code is 1, and the inputs are saved in a folder, if an input gets an answer that is a fault (a status such as
INTERNAL, UNKNOWN or UNAVAILABLE, features without a token, no answer for a minute). It is also 1 if afterwards a
process has died, a gauge of work is not zero, more descriptors are open than before, or the log has a traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from attack import watch
from attack.calling import Finding, Tally, attack
from attack.messages import TOKEN
from bench.record import table
from bench.server import Server, serving, total_pss

INPUTS = 100_000
MODEL_INPUTS = 5_000
GENERATORS = 2
CHUNK = 500
WARM_UP = 400
BOMBS = 0.001
"""Share of inputs that are small and expensive."""
FLAGS = ("--model", "vits16", "--weights", "random:0", "--frontends", "2", "--warm-up-sizes", "none")
SAVED, SHOWN = 100, 20
DESCRIPTORS = 2
"""How many more descriptors a process may have open than before: gRPC's threads open some as they start."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m attack fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=INPUTS, help=f"to the instant runner ({INPUTS})")
    parser.add_argument("--model-inputs", type=int, default=MODEL_INPUTS, help=f"to ViT-S ({MODEL_INPUTS})")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs (0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (0)")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="folder for inputs that are findings")
    given = parser.parse_args(arguments)
    faults = 0
    for module, inputs in (("bench.instant", given.inputs), ("dinov3_server", given.model_inputs)):
        if inputs:
            print(f"{module}: {inputs} inputs, seed {given.seed}", flush=True)
            run = fuzz(module, given.seed, range(given.first, given.first + inputs), given.out)
            print(show(run), flush=True)
            faults += len(run.tally.findings) + len(run.faults)
    print(f"{faults} faults" + (f"; inputs that are findings are in {given.out}" if faults else ""))
    return 1 if faults else 0


@dataclass
class Run:
    """The answers to the inputs, and the server's processes before and after them. `peak` is the most memory of all
    processes together, in bytes; `faults` are those that belong to no single input."""

    tally: Tally = field(default_factory=Tally)
    before: dict[str, watch.Process] = field(default_factory=dict)
    after: dict[str, watch.Process] = field(default_factory=dict)
    peak: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def fuzz(module: str, seed: int, numbers: range, out: Path) -> Run:
    """Send the inputs of these numbers to `python -m MODULE`; inputs that are findings are saved in `out`."""
    with tempfile.TemporaryDirectory() as folder:
        token, log = Path(folder, "token"), Path(folder, "log")
        token.write_text(TOKEN)
        with log.open("wb") as file, serving(*FLAGS, "--token-file", str(token), module=module, log=file) as server:
            run = _attacked(server, seed, numbers)
        run.faults += [f"the log says: {line}" for line in watch.wrong_lines(log)]
    for finding in run.tally.findings[:SAVED]:
        save(finding, out, module, seed)
    return run


def _attacked(server: Server, seed: int, numbers: range) -> Run:
    run = Run()
    with multiprocessing.get_context("spawn").Pool(GENERATORS) as pool:
        # Descriptors that the first calls open are no leak: other inputs, which do not count, come first as a warm-up.
        warm_up = range(numbers.start - WARM_UP, numbers.start)
        pool.map(
            partial(_chunk, server.grpc, server.http, seed, 0.0), [warm_up[i::GENERATORS] for i in range(GENERATORS)]
        )
        watch.settled(lambda: not watch.busy_gauges(server))
        run.before = watch.processes(server)
        since = reported = time.monotonic()
        chunks = [numbers[at : at + CHUNK] for at in range(0, len(numbers), CHUNK)]
        for part in pool.imap_unordered(partial(_chunk, server.grpc, server.http, seed, BOMBS), chunks):
            run.tally.add(part)
            run.peak = max(run.peak, total_pss(server.process))
            if time.monotonic() - reported > 10:
                reported = time.monotonic()
                print(f"  {run.tally.counts.total()} sent, {len(run.tally.findings)} findings", flush=True)
        run.seconds = time.monotonic() - since
    if not watch.settled(lambda: not watch.busy_gauges(server)):
        run.faults.append(f"not zero although the server is idle: {watch.busy_gauges(server)}")
    watch.settled(lambda: not _leaks(run.before, watch.processes(server)))
    run.after = watch.processes(server)
    run.faults += _leaks(run.before, run.after)
    alive = {process.pid for process in run.after.values()}
    run.faults += [f"{name} died" for name, process in run.before.items() if process.pid not in alive]
    return run


def _leaks(before: Mapping[str, watch.Process], after: Mapping[str, watch.Process]) -> list[str]:
    """Return a fault for each process that has more descriptors open than before."""
    return [
        f"{name} has {after[name].descriptors} descriptors open; before there were {first.descriptors}"
        for name, first in before.items()
        if name in after and after[name].pid == first.pid and after[name].descriptors > first.descriptors + DESCRIPTORS
    ]


def _chunk(target: str, http: str, seed: int, bombs: float, numbers: Sequence[int]) -> Tally:
    """Send these inputs; runs in a process of the pool."""
    return asyncio.run(attack(target, http, seed, numbers, bombs))


def save(finding: Finding, out: Path, module: str, seed: int) -> None:
    """Write the messages of an input, and everything else that is needed to send it again, into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    call, name = finding.call, f"{module}-{seed}-{finding.number}"
    for index, message in enumerate(call.messages):
        (out / f"{name}.{index}.bin").write_bytes(message)
    about = {
        "reason": finding.reason,
        "method": call.method,
        "authorization": call.authorization,
        "deadline": call.deadline,
        "cancel_after": call.cancel_after,
        "compression": call.compression.name,
        "messages": len(call.messages),
        "again": f"python -m attack fuzz --seed {seed} --first {finding.number} --inputs 1 --model-inputs 1",
    }
    (out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")


def show(run: Run) -> str:
    count = run.tally.counts.total()
    methods = sorted({method for method, _ in run.tally.counts})
    statuses = sorted({status for _, status in run.tally.counts})
    by_status = [
        {"method": method, **{status: run.tally.counts[method, status] for status in statuses}} for method in methods
    ]
    return "\n".join(
        [
            f"{count} inputs, {count / run.seconds:.0f} a second; all processes had at most {run.peak >> 20} MiB (PSS)",
            table(by_status, "method", *statuses),
            table(watch.rows(run.before, run.after), *watch.COLUMNS),
            *(
                f"FAULT: input {one.number}, {one.call.method}: {one.reason[:300]}"
                for one in run.tally.findings[:SHOWN]
            ),
            *(f"FAULT: {fault}" for fault in run.faults),
        ]
    )
