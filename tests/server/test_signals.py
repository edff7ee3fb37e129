"""Signals reach a server's processes wherever they arrive.

Each test runs a process of its own, most of which send themselves the signal at the place of interest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import LIMIT, until

BEGIN = """
import os, signal, subprocess, sys, threading, time
from dinov3_server import signals
from dinov3_server.signals import *

signal.signal(signal.SIGINT, signal.default_int_handler)

def send(number):
    os.kill(os.getpid(), number)
    for _ in range(1000):  # Python calls the signal's handler here
        pass

class Freed:
    def __init__(self, number):
        self.number = number
    def __del__(self):
        send(self.number)

def forever():
    threading.Event().wait()
"""


def start(code: str, *args: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + code, *args],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(code: str, *args: str) -> tuple[int, str, str]:
    """Run `code` to its end; return exit code, standard output and standard error."""
    process = start(code, *args)
    try:
        output, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        process.wait()
    return process.returncode, output, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_unwinds_and_further_ones_do_not_interrupt_that(number: signal.Signals) -> None:
    code = f"""
with unwinding():
    try:
        send({number:d})
    finally:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        print("cleaned")
"""
    status, output, errors = ended(code)
    assert output == "cleaned\n"
    assert status == (143 if number == signal.SIGTERM else -signal.SIGINT)  # KeyboardInterrupt, here uncaught
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


@pytest.mark.parametrize(
    "place",
    [
        "Freed({number})",
        "try:\n        send({number})\n    except BaseException:\n        pass",
        "try:\n        send({number})\n    finally:\n        forever()",
    ],
    ids=["a destructor", "a block that catches everything", "unwinding that does not end"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_does_not_unwind_is_ended_with_its_process_groups(place: str, number: signal.Signals) -> None:
    code = f"""
signals.UNWIND_SECONDS = 0.05
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(child.pid, flush=True)
with unwinding(), group_killed(child):
    {place.format(number=int(number))}
    forever()
"""
    status, output, _ = ended(code)
    assert status == 128 + number
    until(lambda: not Path(f"/proc/{output.strip()}").exists(), "the child has ended")


def test_an_ignored_sigint_stays_ignored() -> None:
    code = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
with unwinding():
    send(signal.SIGINT)
    print("it went on")
"""
    assert ended(code) == (0, "it went on\n", "")


def test_afterwards_everything_is_as_before() -> None:
    code = """
def state():
    handlers = [signal.getsignal(number) for number in HANDLED]
    return handlers, signal.set_wakeup_fd(-1), threading.active_count(), len(os.listdir("/proc/self/fd"))

before = state()
with unwinding():
    pass
with Signals().caught():
    pass
assert state() == before
"""
    assert ended(code) == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_supervisor_receives_a_signal_in_a_destructor(number: signal.Signals) -> None:
    code = f"""
import select
caught = Signals()
with unwinding(), caught.caught():
    Freed({number:d})
    select.select([caught.reader], [], [])
    print(caught.received)
"""
    assert ended(code) == (0, f"[{number:d}]\n", "")


def test_a_child_is_not_ended_before_it_has_ignored_the_signals() -> None:
    child = """
import sys
from dinov3_server.signals import leave_to_supervisor
print("started", flush=True)
sys.stdin.readline()
leave_to_supervisor()
print("ended", flush=True)
"""
    code = f"""
with blocked_in_children():
    child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
for number in HANDLED:
    child.send_signal(number)
print(child.communicate(b"go on")[0].decode(), end="")
assert child.returncode == 0
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""
    assert ended(code) == (0, "ended\n", "")
