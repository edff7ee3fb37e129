"""Frontends and workers are connected, also after descriptors ran out."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import pytest

from dinov3_server.engine.channel import Channel, pair
from dinov3_server.engine.messages import Connected
from dinov3_server.processes.child import Child
from dinov3_server.processes.connections import Connections


def no_descriptors(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class Ends(NamedTuple):
    """A frontend and a worker that is ready, and the other ends of their channels."""

    frontend: Child
    worker: Child
    of_frontend: Channel
    of_worker: Channel


@pytest.fixture
def ends() -> Iterator[Ends]:
    first, second = pair(), pair()
    frontend = Child("frontend", 0, channel=Channel(first[0]), ready=True)
    worker = Child("worker", 0, "cpu", channel=Channel(second[0]), ready=True)
    made = Ends(frontend, worker, Channel(first[1]), Channel(second[1]))
    yield made
    for channel in (frontend.channel, worker.channel, made.of_frontend, made.of_worker):
        assert channel is not None
        channel.close()


def connected(channel: Channel) -> bool:
    """Tell whether the other end was sent a channel; close it."""
    received = channel.receive()
    for message, descriptors in received:
        assert message == Connected(0)
        os.close(*descriptors)
    return len(received) == 1


@pytest.mark.parametrize("fails", ["dinov3_server.processes.connections.pair", "os.dup"])
def test_connecting_is_tried_again_after_descriptors_ran_out(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    connections = Connections()
    with monkeypatch.context() as patched:
        patched.setattr(fails, no_descriptors)
        for _ in range(3):
            connections.connect(ends.frontend, ends.worker)
    assert [record.getMessage() for record in caplog.records] == [
        "frontend-0 and worker-0 cannot be connected yet: Too many open files"
    ]
    connections.retry(-math.inf)
    assert ends.of_frontend.receive() == [], "it is not time yet"
    connections.retry(math.inf)
    assert connected(ends.of_frontend)
    assert connected(ends.of_worker)
    connections.retry(math.inf)
    assert ends.of_frontend.receive() == [], "once is enough"


@pytest.mark.parametrize("dies", ["", "worker", "frontend"])
def test_a_frontend_without_a_descriptor_for_a_channel_gets_another(ends: Ends, dies: str) -> None:
    connections = Connections()
    connections.retry_later(ends.frontend, ends.worker)
    if dies == "worker":
        ends.worker.ready = False  # its successor will be connected anyway
    if dies == "frontend":
        connections.forget(ends.frontend)
    connections.retry(math.inf)
    assert connected(ends.of_frontend) == (dies == "")
    assert connected(ends.of_worker) == (dies == "")
    ends.worker.ready = True
    connections.retry(math.inf)
    assert ends.of_frontend.receive() == []
