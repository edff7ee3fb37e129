"""The choices of the supervisor before it starts a process: devices, frontends, memory, warnings."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dinov3_server.config.settings import Settings
from dinov3_server.errors import StartupError
from dinov3_server.processes import topology


@pytest.mark.parametrize("host", ["a..b", "a" * 80])
def test_an_invalid_host_name_is_a_startup_error(host: str) -> None:
    with (
        pytest.raises(StartupError, match=f"cannot listen on {host}:0: not a host name; .*--host"),
        topology.hold_port(host, 0),
    ):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.0.1"])
def test_a_loopback_address_gives_no_warning(host: str, caplog: pytest.LogCaptureFixture) -> None:
    topology.warn_if_open(Settings(host=host))
    assert caplog.records == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_port_without_tls_or_authentication_gives_a_warning(
    host: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def warnings(**settings: str) -> str:
        caplog.clear()
        topology.warn_if_open(Settings(host=host, **settings))
        assert all(record.levelno == logging.WARNING for record in caplog.records)
        return caplog.text

    tls = {"tls_cert_file": "cert", "tls_key_file": "key"}
    assert "NOT ENCRYPTED" in warnings()
    assert "NO AUTHENTICATION" in warnings()
    assert "NOT ENCRYPTED" not in warnings(**tls)
    assert "NO AUTHENTICATION" in warnings(**tls)
    assert "NOT ENCRYPTED" in warnings(token_file="tokens")
    assert "NO AUTHENTICATION" not in warnings(token_file="tokens")
    assert warnings(**tls, tls_client_ca_file="ca") == ""


def test_the_arenas_of_all_frontends_must_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "available_memory", lambda: 1000)
    topology.check_memory(2, 500)
    with pytest.raises(StartupError, match=r"2 frontend.*1002 bytes.*--arena-bytes"):
        topology.check_memory(2, 501)


def test_a_driver_without_a_usable_device_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(topology, "_DRIVER", tmp_path)
    monkeypatch.setattr(topology, "_COUNT_CUDA", "print(2)")
    assert topology.choose_devices(("auto",)) == ("cuda:0", "cuda:1")
    assert caplog.text == ""
    monkeypatch.setattr(topology, "_COUNT_CUDA", "raise ImportError('no torch here')")
    assert topology.choose_devices(("auto",)) == ("cpu",)
    assert "no torch here" in caplog.text
    monkeypatch.setattr(topology, "_DRIVER", tmp_path / "none")
    caplog.clear()
    assert topology.choose_devices(("auto",)) == ("cpu",)
    assert caplog.text == ""
