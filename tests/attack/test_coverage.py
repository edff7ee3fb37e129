"""`make fuzz-coverage`: its targets let sound inputs pass, and notice a fault in what they look at."""

from __future__ import annotations

import pytest

from attack import coverage
from attack.images import sound_files
from dinov3_server.api import wire
from dinov3_server.images import cost


@pytest.fixture(autouse=True)
def walked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SHORT_BYTES", wire.SHORT_BYTES)  # put back afterwards: the target sets it


def test_requests_are_read_as_protobuf_reads_them() -> None:
    read = coverage.reading()
    requests = list(coverage._requests())
    assert len(requests) > 100
    for data in [*requests, b"", b"\x0a", b"\xff" * 12]:
        read(data)


def test_a_field_that_is_read_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = coverage.reading()
    monkeypatch.setattr(wire.Walk, "content", lambda self, number: b"another")
    with pytest.raises(AssertionError, match="otherwise than protobuf"):
        list(map(read, coverage._requests()))


def test_a_request_that_is_refused_though_protobuf_reads_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = coverage.reading()
    monkeypatch.setattr(wire, "read_varint", lambda data, position: (_ for _ in ()).throw(wire.DecodeError))
    with pytest.raises(AssertionError, match="refused what protobuf reads"):
        list(map(read, coverage._requests()))


def test_files_are_weighed_and_an_error_of_the_reader_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh = coverage.weighing()
    for data in sound_files():
        weigh(data)

    def broken(data: bytes) -> None:
        raise KeyError(len(data))

    monkeypatch.setattr(cost, "_READERS", dict.fromkeys(cost._READERS, broken))
    with pytest.raises(KeyError):
        weigh(sound_files()[0])
