"""The signals of a server as something that a selector loop can wait for, or as an exception."""

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

# What would end a process by itself and means nothing here. (SIGQUIT still ends it, with a core file.)
UNUSED = (signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


@dataclass
class Signals:
    """Signals that have arrived while `caught`, in order; `reader` becomes readable when one does."""

    received: list[int] = field(default_factory=list)
    reader: socket.socket = field(init=False)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Must be entered on the main thread."""
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
    """Keep signals whose handlers may raise (SIGINT, SIGTERM) until the end of the block.

    They are not masked, as a process that is started in the block would inherit the mask. Python runs handlers on the
    main thread only; on another one this does nothing.
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
    """Have the first SIGTERM end this process as an exception does, PID 1 or not: what it started is ended, and what is
    half done cleared away. A second one must not disturb that."""

    def unwind(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, unwind)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread of process `parent` that started it ends.

    `parent` is the pid that the starter had; if that is dead already, this process ends here.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)  # it died before the line above
