"""Signals of a server, delivered to a selector loop or as an exception, and the death signal of child processes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

# Signals that would end a process by default and are not used here. (SIGQUIT still ends it, with a core file.)
UNUSED = (signal.SIGUSR1, signal.SIGUSR2)
# Signals that a supervisor handles.
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *UNUSED)
# How long a process may take after a signal to end its children and remove unfinished files.
UNWIND_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1
_groups: set[subprocess.Popen[bytes]] = set()


@dataclass
class Signals:
    """The signals that arrived inside `caught`, in order; `reader` becomes readable when one arrives."""

    received: list[int] = field(default_factory=list)
    reader: socket.socket = field(init=False)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch signals until the end of the block. Call it on the main thread."""
        self.reader, writer = socket.socketpair()
        with self.reader, writer:
            self.reader.setblocking(False)
            writer.setblocking(False)
            before = {
                number: signal.signal(number, lambda number, _: self.received.append(number)) for number in HANDLED
            }
            wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            try:
                yield
            finally:
                signal.set_wakeup_fd(wakeup)
                for number, handler in before.items():
                    signal.signal(number, handler)

    def clear(self) -> None:
        with suppress(BlockingIOError):
            self.reader.recv(4096)


@contextmanager
def held() -> Iterator[None]:
    """Delay signals whose handlers may raise (SIGINT, SIGTERM) until the end of the block.

    They are not masked, because a process that is started in the block would inherit the mask. Python runs handlers on
    the main thread only; on another thread this does nothing.
    """
    received: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: received.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)


@contextmanager
def unwinding() -> Iterator[None]:
    """Let the first SIGTERM raise SystemExit and the first SIGINT KeyboardInterrupt, until the end of the block.

    So child processes are ended and unfinished files are removed, also in PID 1. Further signals are ignored meanwhile,
    and an ignored SIGINT (of a shell's background job) stays ignored.

    Python discards an exception in a destructor or a callback, and calls no handler while C code blocks. So a thread
    ends the process, with the exit code 128 + number, if the block has not ended UNWIND_SECONDS after the signal. What
    that leaves behind is what SIGKILL leaves, less the process groups of `group_killed`. Call it on the main thread.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    caught = [signal.SIGTERM, *([signal.SIGINT] if handlers[signal.SIGINT] is not signal.SIG_IGN else [])]

    def unwind(number: int, _: FrameType | None) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        thread = threading.Thread(target=_end_if_stuck, args=(reader,), name="signals", daemon=True)
        thread.start()
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            for each in caught:
                signal.signal(each, unwind)
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            writer.close()
            thread.join()


def _end_if_stuck(reader: socket.socket) -> None:
    """Return when the other end of `reader` is closed, or end the process UNWIND_SECONDS after a signal."""
    first, end = 0, 0.0
    try:
        while numbers := reader.recv(64):
            if not first:
                first = next((each for each in numbers if each in (signal.SIGTERM, signal.SIGINT)), 0)
                end = time.monotonic() + UNWIND_SECONDS
            if first:
                reader.settimeout(max(end - time.monotonic(), 1e-3))
    except TimeoutError:
        for process in tuple(_groups):
            _kill_group(process)
        os._exit(128 + first)


@contextmanager
def group_killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill `process`, the leader of a process group, with its group at the end of the block if it still runs."""
    _groups.add(process)
    try:
        yield
    finally:
        _kill_group(process)
        _groups.discard(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def blocked_in_children() -> Iterator[None]:
    """Block the signals that a supervisor handles in processes started in the block, until `leave_to_supervisor`.

    They would end a process that has not ignored them yet. This process gets them at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_supervisor(but: Collection[int] = ()) -> None:
    """Ignore the signals that a terminal or service manager sends to all processes, except those of `but`.

    The supervisor alone acts on them.
    """
    for number in set(HANDLED) - set(but):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it, of the process with pid `parent`, ends.

    If that process is dead already, this process ends here.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)  # it died before the line above
