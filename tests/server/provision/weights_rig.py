"""Shared by tests of weights: a clean environment for huggingface_hub, a guard on sockets, a variant, searches."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dinov3_server.config.settings import Settings
from dinov3_server.errors import StartupError
from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.families.registry import VARIANTS
from dinov3_server.models.variant import DatasetName
from dinov3_server.provision.weights import Weights, find_or_fetch
from tests.support.fake_hub import FakeHub

DATA = bytes(range(256)) * 40
SAT = DATA[::-1]
TOKEN = "hf_aSecretThatNobodyMaySee"

FACEBOOK = "facebook/dinov3-vitl16-pretrain-lvd1689m"
TIMM = "timm/vit_large_patch16_dinov3.lvd1689m"

SHARDS = {f"model-0000{i}-of-00003.safetensors": bytes([i]) * 50_000 * i for i in (1, 2, 3)}
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": {f"t{n}": n for n in SHARDS}}).encode()}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def variant(name: str = "dinov3_vitl16", **files: bytes) -> VitVariant:
    """Return a variant whose official files are DATA and SAT (or `files`)."""
    held: dict[DatasetName, str] = {"lvd1689m": sha(files.get("lvd1689m", DATA))[:8]}
    if "sat493m" in VARIANTS[name].hashes:
        held["sat493m"] = sha(SAT)[:8]
    return replace(VARIANTS[name], hashes=held)


def clean(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Hide the token, endpoint, cache and switches of the test run's user from the library."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    # The library reads these when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf_hub_cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(folder / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
        close_connections()


def close_connections() -> None:
    """Close the library's open connections; huggingface_hub 1.0 renamed the function."""
    from huggingface_hub import utils

    close = getattr(utils, "close_session", None) or utils.reset_sessions
    close()


def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if it makes a socket or looks up a name."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def everything_written(folder: Path) -> str:
    """Return the text of all manifests and refs under `folder`, and all paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path.read_text() for path in files if path.suffix in (".json", "") or path.parent.name == "refs"]
    return "\n".join([*map(str, files), *texts])


VITL = variant()
LVD_NAME, SAT_NAME = VITL.official_file("lvd1689m"), VITL.official_file("sat493m")
SECRET = "?Policy=secretpolicy&Signature=secretsign"


def put(cache_dir: Path, name: str, data: bytes = DATA) -> Path:
    path = cache_dir / "weights" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def find(cache_dir: Path, weights: str = "auto", **settings: object) -> Weights:
    return find_or_fetch(Settings(cache_dir=str(cache_dir), weights=weights, **settings), VITL)  # type: ignore[arg-type]


def refused(kind: type[StartupError], cache_dir: Path, weights: str = "auto", **settings: object) -> str:
    """Return the message of the error, after checking that it is short and has no secrets."""
    with pytest.raises(kind) as caught:
        find(cache_dir, weights, **settings)
    message = str(caught.value)
    assert len(message.splitlines()) < 20
    assert "secret" not in message
    assert TOKEN not in message
    return message
