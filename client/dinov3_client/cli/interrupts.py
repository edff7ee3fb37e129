"""Ctrl-C and SIGTERM: they end the process at once, wherever its threads are.

Exceptions raised by signal handlers, such as KeyboardInterrupt, cannot do that. Python discards those raised in
destructors and in callbacks, and one raised just after a lock was taken can leave it locked, for other threads to wait
for. So nothing is unwound: a thread reads the signals, removes unfinished files and exits. That is safe at any moment,
because files are complete or absent even after SIGKILL, and an extraction resumes.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dinov3_client import _files

INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds. Reporting and removing take milliseconds, unless the terminal or the disk does not answer.
_PATIENCE = 10.0


@contextmanager
def end_on_signals(report: Callable[[], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM call `report` and end the process with status 130, until the end of the block.

    A signal that is ignored (SIGINT of a shell's background job) stays ignored. Call it on the main thread.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        thread = threading.Thread(target=_watch, args=(reader, report), name="signals", daemon=True)
        thread.start()
        # The interpreter writes a signal's number to `writer` when the signal arrives, and calls its handler later.
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        handlers = {each: signal.getsignal(each) for each in _SIGNALS}
        caught = {each: handler for each, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
        for each in caught:
            signal.signal(each, lambda *_: None)
        try:
            yield
        finally:
            for each, handler in caught.items():
                signal.signal(each, handler)
            signal.set_wakeup_fd(wakeup)
            writer.close()
            thread.join()


def _watch(reader: socket.socket, report: Callable[[], None]) -> None:
    """End the process when the number of one of the signals arrives; return when the other end is closed."""
    while numbers := reader.recv(64):
        if not set(_SIGNALS).isdisjoint(numbers):
            _end(report)


def _end(report: Callable[[], None]) -> None:
    def last_steps() -> None:
        report()
        _files.remove_drafts()  # last: the thread that writes one may soon fail and report an error

    try:
        thread = threading.Thread(target=last_steps, daemon=True)
        thread.start()
        thread.join(_PATIENCE)
    finally:
        os._exit(INTERRUPTED)
