"""Ctrl-C and SIGTERM end a command wherever they arrive.

Each test runs a command in a process of its own, which sends itself the signal at the place of interest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from PIL import Image

from dinov3_client.testing import Failure, FakeServer
from tests.support.waiting import LIMIT

# A shell starts what it puts in the background (`make test &`) with SIGINT ignored, and children inherit that.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from dinov3_client.cli import main
sys.exit(main())
"""

# Runs `info` with `ask` in the place of the question to the server.
ASK = """
import gc, os, signal, sys, threading, time, weakref
from dinov3_client.cli import main
from dinov3_client._client import Client

signal.signal(signal.SIGINT, signal.default_int_handler)
NUMBER = int(sys.argv[1])

def interrupt(*_):
    os.kill(os.getpid(), NUMBER)
    for _ in range(1000):  # Python calls the signal's handler here
        pass

def forever():
    threading.Event().wait()

{place}

Client.model = lambda self, **_: ask()
sys.exit(main(["info"]))
"""

PLACES = {
    "a wait": """
def ask():
    threading.Timer(0.0, interrupt).start()
    forever()
""",
    "a destructor": """
class Freed:
    __del__ = interrupt

def ask():
    Freed()
    forever()
""",
    "a callback of a weak reference": """
class Freed:
    pass

def ask():
    freed = Freed()
    reference = weakref.ref(freed, interrupt)
    del freed
    forever()
""",
    "the garbage collector": """
class Freed:
    def __init__(self):
        self.itself = self
    __del__ = interrupt

def ask():
    Freed()
    gc.collect()
    forever()
""",
    "a block that catches everything": """
def ask():
    try:
        interrupt()
    except BaseException:
        pass
    forever()
""",
    "between taking a lock and its block": """
class Lock:
    def __init__(self):
        self.lock = threading.Lock()
    def __enter__(self):
        self.lock.acquire()
        interrupt()
    def __exit__(self, *_):
        self.lock.release()

def ask():
    lock = Lock()
    other = threading.Event()
    def use():
        other.wait()
        lock.lock.acquire()
        lock.lock.release()
    thread = threading.Thread(target=use)
    thread.start()
    try:
        with lock:
            forever()
    finally:
        other.set()
        thread.join()
""",
    "computing": """
def ask():
    threading.Timer(0.0, interrupt).start()
    while True:
        pass
""",
    "reading from a pipe": """
def ask():
    threading.Timer(0.0, interrupt).start()
    os.read(os.pipe()[0], 1)
""",
    "another signal before it": """
def ask():
    interrupt()
    interrupt()
    forever()
""",
    "standard error that takes no more": """
from dinov3_client.cli import interrupts
interrupts._PATIENCE = 0.1

def ask():
    unread, full = os.pipe()
    os.dup2(full, 2)
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, bytes(1 << 16))
    except BlockingIOError:
        os.set_blocking(2, True)
    interrupt()
    forever()
""",
}


@pytest.mark.parametrize(
    ("place", "number"),
    [*((place, signal.SIGTERM) for place in PLACES), ("a wait", signal.SIGINT), ("a destructor", signal.SIGINT)],
)
def test_a_signal_is_never_lost(place: str, number: signal.Signals) -> None:
    code = ASK.replace("{place}", PLACES[place])
    done = ended([sys.executable, "-c", code, str(int(number))])
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr == ("" if "standard error" in place else "dinov3-client: interrupted\n")


def test_unfinished_files_are_removed(tmp_path: Path) -> None:
    place = """
from pathlib import Path
from dinov3_client import _files
from dinov3_client.bulk import durable

FOLDER = Path(sys.argv[2])

def parts():
    yield b"begun"
    print(len(list(FOLDER.iterdir())), file=sys.stderr)
    interrupt()
    forever()

def ask():
    with _files.atomic_path(FOLDER / "map.png") as draft:
        draft.touch()
        durable.create(FOLDER / "shard", parts())
"""
    code = ASK.replace("{place}", place)
    done = ended([sys.executable, "-c", code, str(int(signal.SIGTERM)), str(tmp_path)])
    assert (done.returncode, done.stderr) == (130, "2\ndinov3-client: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_an_ignored_signal_stays_ignored() -> None:
    code = ASK.replace("signal.default_int_handler", "signal.SIG_IGN")
    code = code.replace("{place}", "def ask():\n    interrupt()\n    raise OSError('it went on')")
    done = ended([sys.executable, "-c", code, str(int(signal.SIGINT))])
    assert (done.returncode, done.stderr) == (1, "dinov3-client: it went on\n")


def test_the_handlers_are_those_of_before_afterwards() -> None:
    code = """
import signal
from dinov3_client.cli import main

def handlers():
    return [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)], signal.set_wakeup_fd(-1)

before = handlers()
assert main(["info", "--target", "localhost:1", "--deadline", "0.05"]) == 1
assert handlers() == before
"""
    assert ended([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("command", ["info", "extract", "pca", "similarity", "fit-projection"])
def test_every_command_ends_while_it_waits_for_the_server(command: str, tmp_path: Path) -> None:
    image, out = tmp_path / "image.png", tmp_path / "out"
    Image.new("RGB", (32, 32)).save(image)
    flags = {
        "info": [],
        "extract": [image, "--out", out],
        "pca": [image, "-o", f"{out}.png"],
        "similarity": [image, "--at", "0.5,0.5", "-o", f"{out}.png"],
        "fit-projection": [image, "-o", f"{out}.safetensors", "--channels", "2"],
    }[command]
    with FakeServer() as server:
        server.gate.clear()
        if command == "info":
            server.model_script = [Failure(grpc.StatusCode.UNAVAILABLE, "busy", retry_after=30.0)]
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, command, *map(str, flags), "--target", server.target],
            env=environment(), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            server.wait_for_calls(1, "GetModel" if command == "info" else "Extract")
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "dinov3-client: interrupted\n" in said


def ended(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
