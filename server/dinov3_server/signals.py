"""SIGTERM and SIGINT as something that a selector loop can wait for."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


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
            signals = (signal.SIGTERM, signal.SIGINT)
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
