"""`make fuzz-coverage`: its targets accept valid inputs, and detect a fault in the code under test."""

from __future__ import annotations

import pytest

from attack import coverage
from attack.images import sound_files
from dinov3_server.api import wire
from dinov3_server.images import cost
from dinov3_serving import framing


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SHORT_BYTES", wire.SHORT_BYTES)  # restored afterwards: the target sets it


def test_requests_are_read_as_protobuf_reads_them() -> None:
    read = coverage.request_target()
    requests = list(coverage._requests())
    assert len(requests) > 100
    for data in [*requests, b"", b"\x0a", b"\xff" * 12]:
        read(data)


def test_a_field_that_is_read_differently_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    read = coverage.request_target()
    monkeypatch.setattr(wire.Scan, "resolve", lambda self, number: b"another")
    with pytest.raises(AssertionError, match="differently than protobuf"):
        list(map(read, coverage._requests()))


def test_a_refused_request_that_protobuf_can_read_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    read = coverage.request_target()
    monkeypatch.setattr(framing, "read_varint", lambda data, position: (_ for _ in ()).throw(wire.DecodeError))
    with pytest.raises(AssertionError, match="refused what protobuf reads"):
        list(map(read, coverage._requests()))


def test_valid_files_pass_and_an_error_of_a_reader_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    decode_file = coverage.file_target()
    for data in sound_files():
        decode_file(data)

    def broken(data: bytes) -> None:
        raise KeyError(len(data))

    monkeypatch.setattr(cost, "_READERS", dict.fromkeys(cost._READERS, broken))
    with pytest.raises(KeyError):
        decode_file(sound_files()[0])
