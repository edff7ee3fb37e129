"""Stored results of parity checks: when a start uses one, and when it compares again."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3_server.backbone.parity import check
from dinov3_server.backbone.parity.upstream_process import UpstreamProcessFailed
from dinov3_server.errors import ParityError
from tests.server.backbone.parity.rig import REVISION, FakeUpstream, Start
from tests.support.waiting import LIMIT


def test_a_restart_uses_the_stored_result(start: Start, upstream: FakeUpstream) -> None:
    for dtype in ("float32", "bfloat16"):
        first, second = start(dtype), start(dtype)
        assert second.info.parity_check == first.info.parity_check
        assert list(second.load_seconds) == ["read", "fingerprint", "build", "warm_up"]
    assert upstream.calls == 2
    assert len(start.stored()) == 2


def test_another_revision_code_or_machine_is_compared_again(
    start: Start, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def with_another_line(module: str) -> Path:
        changed = tmp_path / module.replace("/", "-")
        shutil.copytree(check.PACKAGE, changed, ignore=shutil.ignore_patterns("__pycache__"))
        with (changed / module).open("a") as file:
            file.write("# One more line.\n")
        return changed

    start()
    other = dataclasses.replace(start.provisioned, revision="f" * 40)
    assert start(provisioned=other).info.parity_check.upstream_revision == "f" * 40
    assert upstream.calls == 2
    for module, name, value in (
        (check, "PACKAGE", with_another_line("nn/linear.py")),
        (check, "PACKAGE", with_another_line("backbone/runners/cpu.py")),
        (check, "PACKAGE", with_another_line("backbone/weights/checkpoint.py")),
        (check, "PACKAGE", with_another_line("families/dinov3_vit/model.py")),
        (check, "PACKAGE", with_another_line("models/variant.py")),
        (check, "PACKAGE", with_another_line("backbone/parity/check.py")),  # the bounds
        (check.reference_images, "VERSION", 0),
        (torch, "__version__", "0"),
        (check.host, "has_native_bf16", lambda: "of another machine"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            calls = upstream.calls
            start()
            assert upstream.calls == calls + (name != "has_native_bf16" or not check.host.has_native_bf16())
    start()
    assert len(start.stored()) == upstream.calls


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace(REVISION, "f" * 40),
        lambda text: text.replace('"verified": true', '"verified": "yes"'),
        lambda text: text.replace('"verified": true', '"verified": false'),
        lambda text: text.replace('"output": "cls"', '"output": "registers"'),
        lambda text: text.replace('"relative_error": ', '"relative_error": 0'),
        lambda text: text.replace('"dtype": "bfloat16"', '"dtype": "float32"'),
    ],
)
def test_a_damaged_result_is_replaced(
    start: Start, upstream: FakeUpstream, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    parity_check = start("bfloat16").info.parity_check
    [path] = start.stored()
    whole = path.read_text()
    path.write_text(damage(whole))
    again = start("bfloat16").info.parity_check
    assert dataclasses.replace(again, time=parity_check.time) == parity_check
    assert upstream.calls == 2
    assert "the features are compared again" in caplog.text
    assert json.loads(path.read_text()).keys() == json.loads(whole).keys()


def test_concurrent_starts_compare_once(
    start: Start, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first by a lock that works between threads as between processes."""
    waiting = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "another process is doing it" in record.getMessage():
                waiting.set()

    def slowly(*arguments: Any, **named: Any) -> Any:
        assert waiting.wait(LIMIT)
        return upstream(*arguments, **named)

    monkeypatch.setattr(check, "upstream_features", slowly)
    listener, logger = Listener(), logging.getLogger("dinov3_server.storage")
    logger.addHandler(listener)
    try:
        with caplog.at_level(logging.INFO), ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda _: start().info.parity_check, range(2))
    finally:
        logger.removeHandler(listener)
    assert first == second
    assert upstream.calls == 1


def test_without_a_writable_folder_every_start_compares(
    start: Start, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    start.store.write_text("a file instead of a folder")
    for calls in (1, 2):
        assert start().info.parity_check.verified
        assert upstream.calls == calls
    assert "the parity check is not stored" in caplog.text


def test_reading_a_stored_result_needs_no_lock(
    start: Start, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a volume that is mounted read-only after the first start."""
    start()
    monkeypatch.setattr("dinov3_server.backbone.parity.store.locked", None)
    assert start().info.parity_check.verified
    assert upstream.calls == 1


def test_nothing_is_stored_if_metas_code_fails(start: Start, upstream: FakeUpstream) -> None:
    upstream.failure = UpstreamProcessFailed("exit status 3")
    with pytest.raises(ParityError, match=r"could not be run.*exit status 3"):
        start()
    assert not start.stored()
    upstream.failure = None
    assert start().info.parity_check.verified
