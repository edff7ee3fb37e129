"""Settings that depend on each other, and how they are shown."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from dinov3_server.config.load import load
from dinov3_server.config.settings import SETTINGS, Settings
from dinov3_server.config.types import without_secrets
from dinov3_server.errors import ConfigError


def test_http_host_follows_host_unless_set() -> None:
    assert Settings().http_host == "127.0.0.1"
    assert load({"host": "0.0.0.0"}, {})[0].http_host == "0.0.0.0"
    assert load({"host": "0.0.0.0", "http_host": "127.0.0.1"}, {})[0].http_host == "127.0.0.1"


def test_settings_are_frozen_and_picklable() -> None:
    settings = Settings(devices=("cpu", "cpu"), port=0)
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tls_cert_file": "FILE"}, "tls_cert_file is set and tls_key_file is not"),
        ({"tls_key_file": "FILE"}, "tls_key_file is set and tls_cert_file is not"),
        ({"tls_client_ca_file": "FILE"}, "tls_client_ca_file is set without tls_cert_file"),
        ({"port": "8080"}, "port and http_port are both 8080"),
        (
            {"frontend_bytes": "400MiB"},
            "frontend_bytes (419430400) is less than 4 x max_message_bytes (134217728)",
        ),
        ({"max_queue_images": "511"}, "max_images_per_request (512) is over 75% of max_queue_images (511)"),
    ],
)
def test_settings_that_contradict_each_other(flags: dict[str, str], message: str, existing: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({name: text.replace("FILE", existing) for name, text in flags.items()}, {})
    assert message in str(caught.value)


def test_equal_ports_are_allowed_if_0_or_on_other_hosts() -> None:
    load({"port": "0", "http_port": "0"}, {})
    load({"port": "8080", "http_host": "127.0.0.2"}, {})


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (
            "https://u:p@example.org:8443/a%20b/w.pth?Policy=secret&Signature=x",
            "https://example.org:8443/a%20b/w.pth?...",
        ),
        ("https://example.org/w.pth", "https://example.org/w.pth"),
        ("file:///srv/w.pth", "file:///srv/w.pth"),
        ("hf://timm/vit@main", "hf://timm/vit@main"),
        ("/srv/w.pth?x", "/srv/w.pth?x"),
        ("example.org/a/w.pth?Policy=secret&Signature=x", "example.org/a/w.pth?..."),
        ("https:/example.org/w.pth?Policy=secret", "https:/example.org/w.pth?..."),
        ("https:///w.pth?Policy=secret", "https:///w.pth?..."),
        ("git@github.com:facebookresearch/dinov3.git", "git@github.com:facebookresearch/dinov3.git"),
    ],
)
def test_a_url_is_shown_without_its_secrets(given: str, shown: str) -> None:
    assert without_secrets(given) == shown
    for setting in SETTINGS:
        if setting.name in ("weights", "weights_url", "upstream_repo"):
            assert setting.show(given) == shown


def test_the_cache_folder_is_in_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    assert Settings().cache_folder == Path("/home/user/.cache/dinov3-serving")
    assert Settings(cache_dir="/srv").cache_folder == Path("/srv")


@pytest.mark.parametrize("name", ["cache_dir", "upstream_dir", "weights"])
def test_an_unknown_home_directory(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is '~unknown-user/x.*' and no such home directory is known"):
        Settings(**{name: "~unknown-user/x"})  # type: ignore[arg-type]
