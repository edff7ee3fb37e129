"""Runners that fail in a scripted way, and runners for single tests."""

import os
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from dinov3_server.errors import CheckpointError
from dinov3_server.models.interface import OutputParity, ParityCheck
from tests.support.numpy_runner import NumpyRunner


def bad_weights(model: str, weights: str, **_: object) -> NoReturn:
    raise CheckpointError("scripted: no such key")


def dies(model: str, weights: str, **_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hangs(model: str, weights: str, **_: object) -> NoReturn:
    threading.Event().wait()
    raise AssertionError


def fails_beside_a_thread(model: str, weights: str, **_: object) -> NoReturn:
    """Fail beside a thread that never ends, as some libraries have one: the interpreter would wait for it at exit."""
    threading.Thread(target=threading.Event().wait).start()
    raise RuntimeError("scripted")


def leaves_a_child(model: str, weights: str, **_: object) -> NoReturn:
    """Die and leave the control channel open in an unknown process, until TEST_GATE_FILE exists."""
    for path in Path("/proc/self/fd").iterdir():
        if path.is_symlink() and str(path.readlink()).startswith("socket:"):
            os.set_inheritable(int(path.name), True)
    null = subprocess.DEVNULL
    script = 'until [ -e "$TEST_GATE_FILE" ]; do sleep 0.05; done'
    subprocess.Popen(["sh", "-c", script], close_fds=False, stdin=null, stdout=null, stderr=null)
    dies(model, weights)


class _ClosesBadly(NumpyRunner):
    def close(self) -> None:
        raise RuntimeError("scripted")


def closes_badly(model: str, weights: str, *, device: str, **_: object) -> NumpyRunner:
    return _ClosesBadly(device)


def proven(model: str, weights: str, *, device: str, **_: object) -> NumpyRunner:
    runner = NumpyRunner(device)
    shown = ParityCheck(
        verified=True,
        reason="",
        upstream_revision="6876159a",
        outputs=(
            OutputParity("cls", "bfloat16", 0.25, 0.5),  # not what this runner serves
            OutputParity("cls", "float32", 0.999, 1e-3),
            OutputParity("patches", "float32", 0.998, 2e-3),
        ),
        time="2026-01-02T03:04:05Z",
        not_covered="",
    )
    runner.info = replace(runner.info, parity_check=shown)
    return runner


def reports(model: str, weights: str, *, device: str, **arguments: object) -> NumpyRunner:
    """Write the arguments of the call to TEST_REPORT."""
    named = {"model": model, "weights": weights, "device": device, **arguments}
    lines = [f"{name} = {value!r}\n" for name, value in named.items()]
    Path(os.environ["TEST_REPORT"]).write_text("".join(lines))
    return NumpyRunner(device)


class _FailsToAttach(NumpyRunner):
    def attach(self, arena: int, memory: memoryview) -> None:
        raise RuntimeError("scripted: no page can be locked\nand a second line")


def fails_to_attach(model: str, weights: str, *, device: str, **_: object) -> NumpyRunner:
    """Become ready, and die as soon as a frontend is connected."""
    return _FailsToAttach(device)


def one_dead_device(model: str, weights: str, *, device: str, **_: object) -> NumpyRunner:
    """Fail to start on cuda:1 until TEST_GATE_FILE exists, and fail on cuda:2 as soon as it is ready."""
    if device == "cuda:1" and not Path(os.environ["TEST_GATE_FILE"]).exists():
        raise RuntimeError("scripted: uncorrectable ECC error encountered")
    return _FailsToAttach(device) if device == "cuda:2" else NumpyRunner(device)


class _DiesIdle(NumpyRunner):
    def attach(self, arena: int, memory: memoryview) -> None:
        super().attach(arena, memory)
        threading.Timer(0.1, os._exit, (3,)).start()


def dies_idle(model: str, weights: str, *, device: str, **_: object) -> NumpyRunner:
    """Become ready and attached, and die idle."""
    return _DiesIdle(device)


class _AttachesSlowly(NumpyRunner):
    def attach(self, arena: int, memory: memoryview) -> None:
        waiting = threading.Event()
        while arena > 1 and not Path(os.environ["TEST_GATE_FILE"]).exists():
            waiting.wait(0.01)
        super().attach(arena, memory)


def attaches_slowly(model: str, weights: str, *, device: str, **_: object) -> NumpyRunner:
    """Let all but the first two frontends wait until TEST_GATE_FILE exists."""
    return _AttachesSlowly(device)
