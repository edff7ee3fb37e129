"""Ids of requests, the access log, and the debug line of a request that failed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest

from dinov3_server.api import access_log as access_log_module
from dinov3_server.api.access_log import Access, AccessLog
from dinov3_server.errors import StartupError
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import encoded, picture, serving

REQUEST = pb.ExtractRequest(images=[encoded(picture(16, 16)), encoded(picture(16, 16))])
BROKEN = pb.ExtractRequest(images=[encoded(picture(16, 16))], preprocessing=pb.Preprocessing(preset=77))
ACCESS = Access("id", "Extract", "ipv4:127.0.0.1:1", "OK", 1, 2, 3, 4.5, None)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def sent_id(call: Any) -> str:
    metadata = dict(await call.trailing_metadata())
    assert isinstance(metadata["x-request-id"], str)
    return metadata["x-request-id"]


async def test_each_call_has_an_id_in_its_trailing_metadata() -> None:
    async with serving() as rig:
        calls = [rig.stub.Extract(REQUEST), rig.stub.Extract(BROKEN), rig.stub.GetModel(pb.GetModelRequest())]
        ids = {await sent_id(call) for call in calls}
        assert len(ids) == len(calls)
        failure = await rig.error(BROKEN)  # which checks the details too: abort keeps them beside the id
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("job-7/epoch_3:batch.12", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("two words", False),
        ('quote"', False),
        ("a;b", False),
        ("", False),
    ],
)
async def test_an_id_of_the_caller_is_kept_if_it_is_safe_to_log(given: str, kept: bool) -> None:
    async with serving() as rig:
        call = rig.stub.Extract(REQUEST, metadata=(("x-request-id", given),))
        assert (await sent_id(call) == given) is kept


async def test_the_access_log_has_a_line_for_each_request(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    async with serving(access_log=str(path)) as rig:
        answer = await rig.stub.Extract(REQUEST, metadata=(("x-request-id", "good"),))
        await rig.error(BROKEN, metadata=(("x-request-id", "bad"),))
        message = pb.ExtractStreamRequest(id=5, request=REQUEST)
        stream = rig.stub.ExtractStream(iter([message]), metadata=(("x-request-id", "stream"),))
        await stream.read()
        assert await stream.read() is grpc.aio.EOF
    good, bad, streamed = lines(path)
    assert set(good) == {"ts", *Access._fields}
    assert (good["request_id"], good["method"], good["status"], good["images"]) == ("good", "Extract", "OK", 2)
    assert good["request_bytes"] == REQUEST.ByteSize()
    assert good["response_bytes"] == answer.ByteSize()
    assert good["peer"].startswith("ipv4:127.0.0.1:")
    assert good["error"] is good["trace_id"] is None
    assert good["milliseconds"] > 0
    assert (bad["request_id"], bad["status"], bad["response_bytes"]) == ("bad", "INVALID_ARGUMENT", 0)
    assert "77" in bad["error"]
    assert (streamed["request_id"], streamed["method"], streamed["images"]) == ("stream/5", "ExtractStream", 2)
    assert streamed["request_bytes"] == message.ByteSize()


async def test_a_call_without_a_valid_token_is_logged_too(tmp_path: Path) -> None:
    path, token = tmp_path / "access.jsonl", tmp_path / "token"
    token.write_text("right")
    async with serving(access_log=str(path), token_file=str(token)) as rig:
        await rig.error(REQUEST, metadata=(("authorization", "Bearer wrong"),))
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.stub.ExtractStream(iter([])).read()
    assert [(line["method"], line["status"]) for line in lines(path)] == [
        ("Extract", "UNAUTHENTICATED"),
        ("ExtractStream", "UNAUTHENTICATED"),
    ]
    assert "wrong" not in path.read_text()


async def test_a_failed_request_has_a_line_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dinov3_server.api.requests")
    async with serving() as rig:
        await rig.stub.Extract(REQUEST)
        await rig.error(BROKEN, metadata=(("x-request-id", "bad"),))
    [line] = [record.getMessage() for record in caplog.records if record.name == "dinov3_server.api.requests"]
    assert line.startswith("request bad failed: Extract INVALID_ARGUMENT from ipv4:127.0.0.1:")
    assert "1 images" in line


def test_a_renamed_file_is_opened_again(tmp_path: Path) -> None:
    """As logrotate does it, without a signal."""
    path = tmp_path / "access.jsonl"
    log = AccessLog(str(path))
    log.write(ACCESS)
    log.close()
    log = AccessLog(str(path))
    path.rename(tmp_path / "access.jsonl.1")
    log.write(ACCESS._replace(request_id="next"))
    log.close()
    assert [line["request_id"] for line in lines(path)] == ["next"]
    assert len(lines(tmp_path / "access.jsonl.1")) == 1


def test_a_line_is_one_line_whatever_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    log = AccessLog(str(path))
    log.write(ACCESS._replace(error='line\nbreak \x1b[31m "quote" ' + "x" * 100_000))
    log.close()
    assert len(path.read_bytes()) < 8192
    assert path.read_bytes().count(b"\n") == 1
    assert b"\x1b" not in path.read_bytes()


def test_requests_do_not_wait_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access_log_module, "MOST_WAITING", 4)
    log = AccessLog("/dev/full")
    for _ in range(100):
        log.write(ACCESS)
    log.close()
    assert 0 < len(caplog.records) <= 7, "a warning for the 1st, 2nd, 4th ... lost line"
    assert "lines of the access log are lost: " in caplog.text


def test_a_file_that_cannot_be_opened_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"cannot open .*missing/access.jsonl \(access_log\): No such file"):
        AccessLog(str(tmp_path / "missing" / "access.jsonl"))
