"""Run a command whose standard streams may be closed, full, or a pipe that nothing reads."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

# The exit code of a program that SIGPIPE ended, as shells show it.
READER_GONE = 128 + signal.SIGPIPE


class OutputError(Exception):
    """Standard output cannot be written, for `reason`. Not an OSError: a command may handle those of its files."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(reason)
        self.reason = reason


class _Output:
    """Standard output, which raises OutputError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputError(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputError(error) from error


def run(program: str, command: Callable[[], int]) -> int:
    """Run `command` and return its exit code: READER_GONE if the output's reader ended first, as `| head` does, and 1
    with a message if the output could not be written."""
    _open_missing()
    stream = sys.stdout
    sys.stdout = output = _Output(stream)  # type: ignore[assignment]
    try:
        try:
            return command()
        finally:
            output.flush()
    except OutputError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python writes the rest at its end
        if isinstance(error.reason, BrokenPipeError):
            return READER_GONE
        sys.stderr.write(f"{program}: cannot write to standard output: {error.reason.strerror}\n")
        return 1
    finally:
        sys.stdout = stream


def _open_missing() -> None:
    """Open /dev/null for standard streams that are closed. The next file or socket would get their descriptors."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
