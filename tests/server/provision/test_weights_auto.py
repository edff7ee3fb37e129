"""The order in which `auto` looks for weights, and what it says without a network."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from dinov3_server.config.settings import Settings
from dinov3_server.errors import CheckpointError, ConfigError, Unreachable
from dinov3_server.families.registry import VARIANTS
from dinov3_server.provision import manifest, weights
from dinov3_server.provision.weights import find_or_fetch
from tests.server.provision.weights_rig import (
    DATA,
    FACEBOOK,
    INDEX,
    LVD_NAME,
    SAT,
    SAT_NAME,
    SECRET,
    SHARDS,
    TIMM,
    TOKEN,
    find,
    put,
    refused,
    sha,
)
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.file_server import FileServer


@pytest.mark.parametrize("name", [LVD_NAME, "dinov3_vitl16_pretrain_lvd1689m.pth", "dinov3_vitl16_pretrain.pth"])
def test_a_file_that_the_user_put_into_the_cache_folder_is_hashed_once(
    cache_dir: Path, name: str, no_sockets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(cache_dir, name)
    reads: list[Path] = []
    real = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda file, report: (reads.append(file), real(file))[1])
    for _ in range(2):
        assert find(cache_dir) == (path, LVD_NAME)
    assert reads == [path]
    known = manifest.read(path)
    assert known is not None
    assert (known.source, known.checked_against) == ("put there by hand", "registry")
    find(cache_dir, verify_weights="full")
    assert reads == [path, path]


@pytest.mark.parametrize("name", [LVD_NAME, "dinov3_vitl16_pretrain_lvd1689m.pth", "dinov3_vitl16_pretrain.pth"])
def test_a_wrong_file_in_the_cache_folder_is_neither_used_nor_deleted(cache_dir: Path, hub: FakeHub, name: str) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA})
    path = put(cache_dir, name, b"an error page")
    message = refused(CheckpointError, cache_dir)
    assert sha(b"an error page") in message
    assert sha(DATA)[:8] in message
    assert f"`mv {path} {path}.bad`" in message
    assert f"`dinov3-server weights --model vitl16 --cache-dir {cache_dir}`" in message
    assert path.read_bytes() == b"an error page"
    assert not hub.asked()


def test_an_older_file_name_may_be_of_the_other_dataset(cache_dir: Path, hub: FakeHub) -> None:
    path = put(cache_dir, "dinov3_vitl16_pretrain.pth", SAT)
    hub.publish(TIMM, {"model.safetensors": DATA})
    assert find(cache_dir, dataset="sat493m") == (path, SAT_NAME)
    assert find(cache_dir).label == f"hf://{TIMM}"


def test_if_the_url_fails_the_error_names_its_file(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "download", Mock(side_effect=Unreachable("no network")))
    said = refused(Unreachable, cache_dir, weights_url=f"https://host.invalid/{SAT_NAME}{SECRET}")
    assert "fetching them failed: no network" in said
    assert str(cache_dir / "weights" / SAT_NAME) in said
    assert LVD_NAME not in said


def test_auto_prefers_the_cache_folder_then_weights_url_then_the_hub(
    cache_dir: Path, hub: FakeHub, files: FileServer
) -> None:
    hub.publish(TIMM, {"model.safetensors": b"of the hub"})
    assert find(cache_dir).path.read_bytes() == b"of the hub"
    files.put("/mirror.pth", b"of the mirror")
    mirror = files.url("/mirror.pth")
    assert find(cache_dir, weights_url=mirror).path.read_bytes() == b"of the mirror"
    assert find(cache_dir, weights_url=mirror, offline=True).path.read_bytes() == b"of the mirror"
    put(cache_dir, LVD_NAME)
    assert find(cache_dir, weights_url=mirror).path.read_bytes() == DATA
    assert len(files.requests) == 1
    assert hub.fetched() == ["model.safetensors"]


def test_offline_an_unfetched_weights_url_is_skipped(
    cache_dir: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA})
    fetched = find(cache_dir)
    assert find(cache_dir, weights_url="https://host.invalid/mirror.pth", offline=True) == fetched


def test_with_a_token_metas_repository_is_used(cache_dir: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in (FACEBOOK, TIMM):
        hub.publish(name, {"model.safetensors": name.encode()})
    assert find(cache_dir).label == f"hf://{FACEBOOK}"
    assert not [seen for seen in hub.asked() if TIMM in seen.path]


def test_without_a_token_timms_repository_is_used(
    cache_dir: Path, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name in (FACEBOOK, TIMM):
        hub.publish(name, {"model.safetensors": name.encode()})
    assert find(cache_dir) == (
        cache_dir / "weights" / TIMM.replace("/", "--") / COMMIT / "model.safetensors",
        f"hf://{TIMM}",
    )
    assert not [seen for seen in hub.asked() if FACEBOOK in seen.path]
    assert "no Hugging Face token is set (HF_TOKEN)" in caplog.text


@pytest.mark.parametrize("why", ["gated", "unknown token", "not on this mirror"])
def test_if_metas_repository_is_refused_timms_is_used_with_a_warning(
    cache_dir: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in (FACEBOOK, TIMM):
        hub.publish(name, {"model.safetensors": name.encode()})
    match why:
        case "gated":
            hub.gate(FACEBOOK)
        case "unknown token":
            hub.refuse_token(FACEBOOK)
        case _:
            hub.hub.always(hub.api(FACEBOOK), hub.refusal(404, "RepoNotFound", "Repository not found"))
    assert find(cache_dir).label == f"hf://{TIMM}"
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert f"hf://{TIMM} instead" in line
    assert hub.url in line
    assert TOKEN not in line
    # A token that the hub does not know would be refused for open repositories, too.
    sent = {seen.headers.get("authorization") for seen in hub.asked() if TIMM in seen.path}
    assert sent == {None if why == "unknown token" else f"Bearer {TOKEN}"}


def test_fetched_weights_stay_in_use_when_a_token_is_added(
    cache_dir: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (FACEBOOK, TIMM):
        hub.publish(name, {"model.safetensors": name.encode()})
    first = find(cache_dir)
    asked = len(hub.asked())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find(cache_dir) == find(cache_dir, offline=True) == first
    assert len(hub.asked()) == asked


def test_the_satellite_weights(cache_dir: Path, hub: FakeHub) -> None:
    hub.publish("timm/vit_large_patch16_dinov3.sat493m", {"model.safetensors": SAT})
    assert find(cache_dir, dataset="sat493m").label == "hf://timm/vit_large_patch16_dinov3.sat493m"


@pytest.mark.parametrize("source", ["auto", "https://host.invalid/x.pth", "hf://me/tuned", "/x.pth"])
def test_a_dataset_that_the_variant_was_not_trained_on(cache_dir: Path, source: str, no_sockets: None) -> None:
    settings = Settings(cache_dir=str(cache_dir), weights=source, dataset="sat493m")
    with pytest.raises(ConfigError, match="dinov3_vitb16 was not trained on sat493m; it was on lvd1689m"):
        find_or_fetch(settings, VARIANTS["dinov3_vitb16"])


def test_a_variant_that_is_not_on_the_hub(cache_dir: Path, hub: FakeHub) -> None:
    with pytest.raises(ConfigError, match="is not on Hugging Face") as caught:
        find_or_fetch(Settings(cache_dir=str(cache_dir)), VARIANTS["dinov3_vitl16plus"])
    assert "DINOV3_WEIGHTS_URL" in str(caught.value)
    assert not hub.asked()


# Offline.


@pytest.mark.parametrize("switch", ["offline", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_errors_name_the_file_and_the_ways_to_get_it(
    cache_dir: Path, no_sockets: None, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    if switch != "offline":
        monkeypatch.setenv(switch, "1")
    message = refused(Unreachable, cache_dir, offline=switch == "offline")
    target = cache_dir / "weights" / LVD_NAME
    assert f"{switch} forbids" in message.replace("`", "")
    assert f"The missing file is\n    {target}\n" in message
    assert "dinov3-server weights --model vitl16 --cache-dir FOLDER" in message
    assert f"curl -fL -o {target} 'URL'" in message
    assert f"hf download {TIMM} --local-dir FOLDER" in message
    assert not cache_dir.exists()


def test_offline_no_source_opens_a_socket(cache_dir: Path, no_sockets: None) -> None:
    message = refused(Unreachable, cache_dir, f"https://host.invalid/{LVD_NAME}{SECRET}", offline=True)
    assert str(cache_dir / "weights" / LVD_NAME) in message
    assert "curl -fL" in refused(Unreachable, cache_dir, f"https://host.invalid/mirror.pth{SECRET}", offline=True)
    message = refused(Unreachable, cache_dir, "hf://me/tuned@v1", offline=True)
    assert "hf download me/tuned --revision v1 --local-dir FOLDER" in message
    assert "dinov3-server weights --model vitl16 --source hf://me/tuned@v1 --cache-dir FOLDER" in message


def test_offline_errors_suggest_the_hub_only_if_it_has_the_model(cache_dir: Path, no_sockets: None) -> None:
    with pytest.raises(Unreachable) as caught:
        find_or_fetch(Settings(cache_dir=str(cache_dir), offline=True), VARIANTS["dinov3_vitl16plus"])
    assert VARIANTS["dinov3_vitl16plus"].official_file("lvd1689m") in str(caught.value)
    assert "hf download" not in str(caught.value)


# A cache_dir that cannot be written.


def test_a_read_only_cache_folder_works(cache_dir: Path, hub: FakeHub) -> None:
    put(cache_dir, LVD_NAME)
    find(cache_dir)
    hub.publish("me/tuned", {**SHARDS, **INDEX})
    tuned = find(cache_dir, "hf://me/tuned")
    before = {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")}
    folders = [cache_dir, *(path for path in cache_dir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert find(cache_dir).label == LVD_NAME
        assert find(cache_dir, "hf://me/tuned", offline=True) == tuned
        assert {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")} == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_changed_modification_time_is_accepted(cache_dir: Path, no_sockets: None) -> None:
    path = put(cache_dir, LVD_NAME)
    find(cache_dir)
    os.utime(path, ns=(1, 1))
    assert find(cache_dir).path == path
    known = manifest.read(path)
    assert known is not None
    assert known.mtime_ns == 1
