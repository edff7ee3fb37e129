"""A client and the processes of its process: forked, spawned, pickled. The server is a process of its own."""

from __future__ import annotations

import asyncio
import functools
import gc
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov3_client import AsyncClient, Client
from dinov3_client.testing import MODEL, FakeServer, expected
from tests.support.waiting import LIMIT

OPTIONS: Any = {"outputs": "cls", "preset": "none", "dtype": "float32"}
SERVE = """
import dataclasses, sys
from dinov3_client.testing import MODEL, FakeServer
with FakeServer(dataclasses.replace(MODEL, frontends=2)) as server:
    print(server.target, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        assert server.stdin is not None
        server.stdin.close()


def photo(index: int) -> np.ndarray[Any, Any]:
    return np.full((16, 32, 3), index, np.uint8)


def use(client: Client, count: int = 5) -> None:
    for index, features in enumerate(client.extract_many(map(photo, range(count)), in_flight=3, **OPTIONS)):
        np.testing.assert_array_equal(features.cls, [expected(photo(index), "cls")])


def tell(told: Connection, function: Callable[..., object], *given: Any) -> None:
    try:
        function(*given)
        told.send("well")
    except BaseException as error:
        told.send(f"{type(error).__name__}: {error}")


def start(how: str, function: Callable[..., object], *given: Any) -> tuple[Any, Connection]:
    context: Any = multiprocessing.get_context(how)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(there, function, *given))
    process.start()
    there.close()
    return process, here


def outcome(process: Any, here: Connection) -> object:
    try:
        if not here.poll(LIMIT):
            return "it hangs"
        told = here.recv()
        process.join(LIMIT)
        return told if process.exitcode == 0 else f"exit code {process.exitcode}"
    except EOFError:
        process.join(LIMIT)
        return f"exit code {process.exitcode}, without a word"
    finally:
        process.kill()
        process.join()


def apart(test: Callable[..., None]) -> Callable[..., None]:
    """`test` in an interpreter of its own. In this one other tests may have left what gRPC does not fork with: servers
    and asyncio's clients."""

    @functools.wraps(test)
    def wrapper(**given: Any) -> None:
        assert outcome(*start("spawn", unwrapped, test.__name__, given)) == "well"

    return wrapper


def unwrapped(name: str, given: dict[str, Any]) -> None:
    globals()[name].__wrapped__(**given)


def use_and_close(client: Client) -> None:
    use(client)
    client.close()


@pytest.mark.parametrize("how", ["fork", "spawn"])
@pytest.mark.parametrize("used", [False, True])
@apart
def test_children_use_their_copies(target: str, how: str, used: bool) -> None:
    with Client(target, deadline=LIMIT, connections=2) as client:
        if used:
            use(client)
        children = [start(how, use_and_close, client) for _ in range(3)]
        use(client)  # the parent's own goes on meanwhile
        assert [outcome(*one) for one in children] == ["well"] * 3
        use(client)


@apart
def test_forked_again_and_again(target: str) -> None:
    """As a DataLoader's workers are, at each epoch; and by a child too."""
    with Client(target, deadline=LIMIT) as client:
        for _ in range(8):
            use(client, 2)
            assert outcome(*start("fork", fork_and_use, client)) == "well"


def fork_and_use(client: Client) -> None:
    use(client, 2)
    assert outcome(*start("fork", use_and_close, client)) == "well"
    use(client, 2)


def test_a_forked_child_may_end_as_any_process_does(target: str) -> None:
    """With all that an interpreter does at its end, and the parent's connections among its garbage."""
    code = f"""
import os, sys
from dinov3_client import Client
client = Client({target!r}, deadline={LIMIT})
client.model()
pid = os.fork()
client.model()
if pid:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=LIMIT, check=False, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("call", ["list(client.extract_many(images))", "client.extract(images)"])
def test_a_program_ends_whatever_it_waits_for(call: str) -> None:
    """It is not held up until the deadlines of calls in flight, which may be an hour."""
    code = f"""
import sys, threading
import numpy as np
from dinov3_client import Client
client = Client(sys.argv[1], deadline=3600)
images = [np.zeros((16, 32, 3), np.uint8)] * 4
threading.Thread(target=lambda: {call}, daemon=True).start()
sys.stdin.read()
"""
    limits = replace(MODEL.limits, max_images_per_request=1)
    with FakeServer(replace(MODEL, limits=limits)) as server:
        server.gate.clear()
        command = [sys.executable, "-c", code, server.target]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as program:
            try:
                server.wait_for_calls(4)
                assert program.communicate(timeout=LIMIT) == (None, b"")
                assert program.returncode == 0
            finally:
                program.kill()


@apart
def test_the_parents_connections_are_left_alone(target: str) -> None:
    """A child that drops, or closes, its copy cuts no one off."""
    clients = [Client(target, deadline=LIMIT)]
    with clients[0] as client, ThreadPoolExecutor(1) as thread:
        use(client)
        child = start("fork", drop, clients)
        answers = thread.submit(use, client, 30)
        assert outcome(*child) == "well"
        answers.result(LIMIT)


def drop(clients: list[Any]) -> None:
    if isinstance(clients[0], Client):
        clients[0].close()
    clients.clear()
    gc.collect()


@apart
def test_a_child_of_a_process_with_asyncio_drops_what_it_inherited(target: str) -> None:
    """Its poller, which gRPC's destructors would wait for, is not there."""

    async def ask(client: AsyncClient) -> None:
        await client.model()
        assert outcome(*start("fork", drop, [client])) == "well"
        await client.model()
        await client.close()

    asyncio.run(ask(AsyncClient(target, deadline=LIMIT)))


@apart
def test_a_closed_client_stays_closed(target: str) -> None:
    client = Client(target)
    client.close()
    assert outcome(*start("fork", use, client)) == "ValueError: this client is closed"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_pickled_client_has_its_arguments(kind: type[Client | AsyncClient]) -> None:
    here = Path(__file__).parent
    arguments: dict[str, Any] = {
        "connections": 3,
        "deadline": 7.0,
        "token": "s3cret",
        "tls_ca": here / "localhost.pem",
        "tls_cert": here / "client.pem",
        "tls_key": str(here / "client.key"),
        "fingerprint": "f00d",
        "keepalive": None,
        "mixed_models": True,
    }
    client = kind(["localhost:1", "dns:///localhost:2"], **arguments)
    copy = pickle.loads(pickle.dumps(client))
    assert type(copy) is kind
    make, () = copy.__reduce__()
    assert make.keywords == {"target": ["localhost:1", "dns:///localhost:2"], **arguments}
