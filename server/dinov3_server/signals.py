"""Signals of a server, delivered to a selector loop or as an exception, and the death signal of child processes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

# Signals that would end a process by default and are not used here. (SIGQUIT still ends it, with a core file.)
UNUSED = (signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


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
            signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *UNUSED)
            before = {
                number: signal.signal(number, lambda number, _: self.received.append(number)) for number in signals
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


def unwind_on_sigterm() -> None:
    """Let the first SIGTERM raise SystemExit, also in PID 1, so that child processes are ended and unfinished files are
    removed. Further ones are ignored, so that they do not interrupt that."""

    def unwind(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, unwind)


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it, of the process with pid `parent`, ends.

    If that process is dead already, this process ends here.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)  # it died before the line above
