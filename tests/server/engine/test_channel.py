"""Channels: framing, coalescing, descriptors, and a peer that reads late or has died."""

import errno
import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from dinov3_server.engine.channel import Channel, ChannelClosed, pair
from tests.support.waiting import open_descriptors


@pytest.fixture
def ends():
    ours, theirs = (Channel(end) for end in pair())
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_arrive_together_and_in_order(ends):
    ours, theirs = ends
    for number in range(5):
        ours.send(("message", number))
    assert ours.flush()
    assert [message for message, _ in theirs.receive()] == [("message", number) for number in range(5)]
    assert theirs.receive() == []


def test_descriptors_stay_with_their_message(ends):
    ours, theirs = ends
    pipes = [os.pipe() for _ in range(3)]
    ours.send("plain")
    ours.send("one", [pipes[0][1]])
    ours.send("two", [pipes[1][1], pipes[2][1]])
    ours.send("last")
    for _, writer in pipes:
        os.close(writer)  # the channel has duplicates
    assert ours.flush()
    received = []
    while len(received) < 4:
        received += theirs.receive()
    assert [message for message, _ in received] == ["plain", "one", "two", "last"]
    assert [len(fds) for _, fds in received] == [0, 1, 2, 0]
    for (reader, _), fd in zip(pipes, [fd for _, fds in received for fd in fds], strict=True):
        os.write(fd, b"x")
        os.close(fd)
        assert os.read(reader, 2) == b"x"
        assert os.read(reader, 2) == b""  # no copy of the writing end is left open
        os.close(reader)


def test_flush_does_not_block_on_a_peer_that_does_not_read_and_nothing_is_lost(ends):
    ours, theirs = ends
    count = 0
    while ours.flush():
        ours.send((count, b"x" * 100_000))
        count += 1
    assert not ours.flush_within(0.01)
    received = []
    while len(received) < count:
        received += [message[0] for message, _ in theirs.receive()]
        ours.flush()
    assert received == list(range(count))


def test_messages_of_a_dead_peer_are_received_before_channel_closed(ends):
    ours, theirs = ends
    ours.send("last words")
    ours.flush()
    ours.close()
    assert [message for message, _ in theirs.receive()] == ["last words"]
    with pytest.raises(ChannelClosed):
        theirs.receive()
    theirs.send("too late")
    assert theirs.flush()  # discarded: `receive` reports the end, not `flush`


def test_unsent_and_unread_descriptors_are_closed_with_the_channel():
    before = open_descriptors()
    ours, theirs = (Channel(end) for end in pair())
    reader, writer = os.pipe()
    ours.send("sent", [writer])
    ours.flush()
    ours.send("unsent", [writer])
    theirs._socket.recv(1)  # an incomplete frame, whose descriptors are not returned to the caller
    ours.close()
    theirs.close()
    os.close(reader)
    os.close(writer)
    assert open_descriptors() == before


def test_a_descriptor_over_the_limit_is_minus_one_and_later_ones_stay_with_their_messages() -> None:
    ours, theirs = (Channel(end) for end in pair())
    before = open_descriptors()
    with Path("/dev/null").open() as null, Path("/dev/zero").open() as zero:
        for message, fds in ((1, []), (2, [null.fileno()]), (3, [zero.fileno()]), (4, [])):
            ours.send(message, fds)
            ours.flush()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            first = theirs.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert first == [(1, []), (2, [-1]), (3, [-1]), (4, [])]
    ours.send(5, [ours.fileno()])
    ours.flush()
    ((message, (fd,)),) = theirs.receive()
    assert message == 5
    os.close(fd)
    assert open_descriptors() == before
    ours.close()
    theirs.close()


@pytest.mark.parametrize("number", [errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM])
def test_a_message_that_the_kernel_cannot_take_now_is_sent_later(number: int) -> None:
    class Full:
        def __init__(self, end: socket.socket) -> None:
            self.end, self.full = end, True

        def sendmsg(self, *arguments: Any) -> int:
            if self.full:
                raise OSError(number, os.strerror(number))
            return self.end.sendmsg(*arguments)

        def close(self) -> None:
            self.end.close()

    ours, theirs = (Channel(end) for end in pair())
    ours._socket = full = Full(ours._socket)  # type: ignore[assignment]
    ours.send("hello", [theirs.fileno()])
    assert not ours.flush()
    full.full = False
    assert ours.flush()
    ((message, (fd,)),) = theirs.receive()
    assert message == "hello"
    os.close(fd)
    ours.close()
    theirs.close()
