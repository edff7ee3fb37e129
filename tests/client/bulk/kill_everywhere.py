"""Kills an extraction at each of its calls that change the disk, goes on, and compares with one that was left alone.

    python -m tests.client.bulk.kill_everywhere FOLDER [SCENARIO...]

A process of its own, since it forks: a run that is killed is a child, and what it does is counted by wrappers around
the calls of `os`. Before each call it is killed once, and once more in the middle of each that writes. Where it goes on
after the former it is killed again, at another place; the last run comes to its end.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinov3_client.bulk.rows import ExtractionOptions
from tests.client.bulk import stub

CALLS = ("open", "write", "fsync", "replace", "ftruncate", "unlink", "mkdir")
SCENARIOS = {
    # Shards end at rows; the last one is short; failures before, between and after all rows.
    "shards": (ExtractionOptions(shard_rows=2), {0, 3, 4, 7}, 8, False),
    "mixed": (ExtractionOptions(preset="none", shard_rows=3, outputs=("cls",), layers=(3,)), {2}, 4, True),
    "full": (ExtractionOptions(shard_rows=2, outputs=("cls",)), set(), 4, False),
    # A single shard, at the end: all rests on partial.bin.
    "partial": (ExtractionOptions(outputs=("cls",), dtype="int8"), {5}, 13, False),
    "failed": (ExtractionOptions(), {0, 1}, 2, False),
    "npz": (ExtractionOptions(format="npz"), {1}, 3, False),
}


def main(folder: Path, scenarios: list[str]) -> None:
    for name in scenarios or SCENARIOS:
        options, broken, count, mixed = SCENARIOS[name]
        source = folder / name / "source"
        source.mkdir(parents=True)
        for index in range(count):
            size = (32, 16 * (1 + index % 2)) if mixed else (32, 32)
            data = stub.broken(index) if index in broken else stub.contents(index, size=size)
            (source / f"{index:02}.jpg").write_bytes(data)
        whole = folder / name / "whole"
        calls = len(_calls(source, whole, options))
        assert stub.tree(whole), "the run that nobody killed has written nothing"
        expected = stub.tree(whole)
        killed = 0
        for point in range(calls):
            for half in (False, True):
                out = folder / name / f"{point}-{half}"
                if not _run(source, out, options, point, half):
                    assert half, f"{name}: the run has no call {point}"
                    continue  # not a call that writes
                killed += 1
                if not half:
                    _run(source, out, options, (point * 5 + 3) % calls)
                assert not _run(source, out, options), "it is not killed any more"
                found = stub.tree(out)
                for file in expected.keys() | found.keys():
                    assert found.get(file) == expected.get(file), (
                        f"{name}, killed at call {point}{' half way' if half else ''}: {file} differs:\n"
                        f"{found.get(file)!r:.2000}\n{expected.get(file)!r:.2000}"
                    )
        sys.stdout.write(f"{name}: {killed} places of {calls} calls\n")


def _calls(source: Path, out: Path, options: ExtractionOptions) -> list[str]:
    """The names of the calls of a run that nobody kills."""
    reading, writing = os.pipe()

    def body() -> None:
        names: list[str] = []
        _wrap(lambda name, call, args: (names.append(name), call(*args))[1])
        stub.run(source, out, options)
        os.write(writing, " ".join(names).encode())

    assert not _forked(body)
    os.close(writing)
    with open(reading, "rb") as file:  # noqa: PTH123 - of a descriptor
        return file.read().decode().split()


def _run(source: Path, out: Path, options: ExtractionOptions, point: int | None = None, half: bool = False) -> bool:
    """Extract in a child, which kills itself at the call `point`; whether it did."""

    def body() -> None:
        count = 0

        def step(name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            nonlocal count
            if count == point and (name == "write" or not half):
                if half:
                    call(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return call(*args)

        _wrap(step)
        stub.run(source, out, options)

    return _forked(body)


def _wrap(step: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> None:
    """All calls that change the disk go through `step`, one after the other."""

    def wrapped(name: str) -> Callable[..., Any]:
        call = getattr(os, name)
        real = (lambda descriptor: None) if name == "fsync" else call  # the machine keeps its power

        def through(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_CREAT | os.O_TRUNC):
                return call(*args, **kwargs)
            return step(name, real, args)

        return through

    for name in CALLS:
        setattr(os, name, wrapped(name))


def _forked(body: Callable[[], None]) -> bool:
    """Run it in a child; whether that was killed. Any other failure is one here too."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            sys.stderr.flush()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed: see above"
    return False


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
