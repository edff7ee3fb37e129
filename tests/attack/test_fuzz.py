"""`make fuzz`: its inputs are reproducible, it finds faults, and this server has none."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import grpc
import pytest

from attack import fuzz, images, messages, watch
from attack.calling import fault
from attack.messages import Call
from dinov3_serving.v1 import feature_service_pb2 as pb

PLAIN = Call(messages.EXTRACT, (b"",))


def test_a_seed_gives_the_same_inputs_again() -> None:
    first, again, other = ([messages.call(seed, number) for number in range(400)] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    names = {call.name for call in first}
    assert names == {
        "Extract",
        "ExtractStream",
        "GetModel",
        "Check",
        "Watch",
        "List",
        "ServerReflectionInfo",
        "other",
        "HTTP",
    }


def test_bombs_are_small() -> None:
    rng = random.Random(0)
    for bomb in images._BOMBS:
        for _ in range(4):
            assert len(bomb(rng)) < 1 << 20


@pytest.mark.parametrize(
    ("call", "status", "answers"),
    [
        (PLAIN, "INTERNAL", ()),
        (PLAIN, "UNKNOWN", ()),
        (PLAIN, "UNAVAILABLE", ()),
        (PLAIN, "hung", ()),
        (PLAIN, "CANCELLED", ()),
        (PLAIN, "DEADLINE_EXCEEDED", ()),
        (Call(messages.HTTP, (b"",)), "500", ()),
        (Call(messages.HTTP, (b"",)), "hung", ()),
        (PLAIN, "OK", [b"\xff"]),
        (PLAIN, "OK", [pb.ExtractResponse(errors=[pb.ImageError(status=pb.Status(code=13))]).SerializeToString()]),
        (dataclasses.replace(PLAIN, authorization=None), "OK", ()),
        (dataclasses.replace(PLAIN, authorization="Bearer wrong"), "INVALID_ARGUMENT", ()),
        (
            Call(messages.STREAM, ()),
            "OK",
            [pb.ExtractStreamResponse(id=1, error=pb.Status(code=2)).SerializeToString()],
        ),
    ],
)
def test_answers_that_are_faults(call: Call, status: str, answers: list[bytes]) -> None:
    assert fault(call, status, answers)


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (PLAIN, "OK"),
        (PLAIN, "INVALID_ARGUMENT"),
        (PLAIN, "RESOURCE_EXHAUSTED"),
        (dataclasses.replace(PLAIN, deadline=0.1), "DEADLINE_EXCEEDED"),
        (dataclasses.replace(PLAIN, cancel_after=0.1), "CANCELLED"),
        (dataclasses.replace(PLAIN, authorization=None), "UNAUTHENTICATED"),
        (dataclasses.replace(PLAIN, compression=grpc.Compression.Gzip), "UNIMPLEMENTED"),
        (Call(messages.CHECK, (b"",), authorization=None), "OK"),
        (Call("/a", (b"",)), "UNIMPLEMENTED"),
        (Call(messages.HTTP, (b"",)), "404"),
    ],
)
def test_answers_that_are_allowed(call: Call, status: str) -> None:
    assert fault(call, status, ()) is None


def test_a_traceback_in_the_log_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("12:00 info ready\n12:01 error failed\nTraceback (most recent call last):\n  File\n")
    assert watch.wrong_lines(log) == ["Traceback (most recent call last): |   File"]


def test_the_faults_of_a_faulty_server_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DIED_FILE", str(tmp_path / "died"))
    monkeypatch.setattr(fuzz, "WARM_UP", 4)
    run = fuzz.fuzz("tests.attack.faulty", 0, range(200), tmp_path)
    reasons = [finding.reason for finding in run.tally.findings]
    assert any("not finite" in reason for reason in reasons)
    assert "worker-0 died" in run.faults
    about = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(about) == len(reasons)
    assert all(len(list(tmp_path.glob("*.bin"))) >= each["messages"] for each in about)
    assert "FAULT" in fuzz.show(run)


def test_this_server_has_no_faults(tmp_path: Path) -> None:
    run = fuzz.fuzz("bench.instant", 0, range(1000, 1300), tmp_path)
    assert not run.tally.findings
    assert not run.faults
    assert run.tally.counts["Extract", "OK"] > 50
    assert run.peak > 0
