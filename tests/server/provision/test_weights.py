"""Every source of weights, and the order of `auto`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from dinov3_server.config.settings import Settings
from dinov3_server.errors import AccessRefused, CheckpointError, ConfigError, StartupError, StorageError, Unreachable
from dinov3_server.families.registry import VARIANTS
from dinov3_server.provision import manifest, weights
from dinov3_server.provision.weights import Weights, find_or_fetch
from tests.server.provision.weights_rig import (
    DATA,
    FACEBOOK,
    INDEX,
    SAT,
    SHARDS,
    TIMM,
    TOKEN,
    everything_written,
    sha,
    variant,
)
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.file_server import Answer, FileServer

VITL = variant()
LVD_NAME, SAT_NAME = VITL.official_file("lvd1689m"), VITL.official_file("sat493m")
SECRET = "?Policy=secretpolicy&Signature=secretsign"


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache_dir"


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


# A path.


def test_a_file_is_used_in_place(cache_dir: Path, tmp_path: Path, no_sockets: None) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(b"anything")
    assert find(cache_dir, str(path), offline=True) == (path, "mine.pth")
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_folder_and_an_index_are_used_in_place(cache_dir: Path, tmp_path: Path, no_sockets: None) -> None:
    folder = tmp_path / "timm-large"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_bytes(INDEX[index.name])
    assert find(cache_dir, str(folder)) == (folder, "timm-large")
    assert find(cache_dir, str(index)) == (index, index.name)
    assert list(folder.iterdir()) == [index]


def test_a_path_may_begin_with_the_users_home(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.pth").write_bytes(DATA)
    assert find(cache_dir, "~/mine.pth").path == tmp_path / "mine.pth"


def test_a_signed_url_without_its_scheme_is_a_path_and_is_not_shown(cache_dir: Path) -> None:
    said = refused(ConfigError, cache_dir, f"example.org/a/w.pth{SECRET}/secret")
    assert said == "weights is 'example.org/a/w.pth?...', and there is no folder example.org/a that can be read"


def test_the_signature_in_a_file_name_of_wget_is_not_shown(cache_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / f"w.pth{SECRET}"
    path.write_bytes(DATA)
    assert find(cache_dir, weights=str(path)) == (path, "w.pth?...")


def test_an_unusable_path(cache_dir: Path) -> None:
    with pytest.raises(StorageError, match=r"weights is '/x+': File name too long \(this process is uid \d+\)"):
        find(cache_dir, weights="/" + "x" * 300)


@pytest.mark.parametrize("source", ["auto", "https://host.invalid/x.pth", "hf://me/tuned"])
def test_an_unusable_cache_folder(tmp_path: Path, source: str, no_sockets: None) -> None:
    with pytest.raises(StorageError, match=r"File name too long; choose another folder with --cache-dir"):
        find(tmp_path / ("x" * 300), weights=source)


def test_a_missing_file_gets_suggestions(cache_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "dinov3_vitl16.pth").write_bytes(DATA)
    (tmp_path / ".hidden").write_bytes(DATA)
    message = refused(ConfigError, cache_dir, str(tmp_path / "dinov3_vitl61.pth"))
    assert f"no 'dinov3_vitl61.pth' in {tmp_path}; did you mean dinov3_vitl16.pth?" in message
    assert "it holds dinov3_vitl16.pth" in refused(ConfigError, cache_dir, str(tmp_path / "zzz"))
    assert f"no folder {tmp_path}/none that can be read" in refused(
        ConfigError, cache_dir, str(tmp_path / "none" / "x.pth")
    )


@pytest.mark.parametrize("url", ["s3://bucket/x.pth", "https:/x.pth", "ftp://u:secret@host/x.pth?secret"])
def test_other_url_schemes_are_refused(cache_dir: Path, url: str) -> None:
    assert "weights is" in refused(ConfigError, cache_dir, url)


# A URL.


def test_an_official_file_from_a_signed_url(
    cache_dir: Path, files: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    files.put(f"/a/{LVD_NAME}", DATA)
    url = files.url(f"/a/{LVD_NAME}{SECRET}")
    for _ in range(2):
        assert find(cache_dir, url) == (cache_dir / "weights" / LVD_NAME, LVD_NAME)
    assert [(seen.method, seen.query) for seen in files.requests] == [("GET", SECRET[1:])]
    known = manifest.read(cache_dir / "weights" / LVD_NAME)
    assert known is not None
    assert known.source == files.url(f"/a/{LVD_NAME}?...")
    assert (known.sha256, known.checked_against) == (sha(DATA), "registry")
    assert "secret" not in everything_written(cache_dir) + caplog.text
    assert find(cache_dir, offline=True).path == cache_dir / "weights" / LVD_NAME


@pytest.mark.parametrize("name", ["dinov3_vitl16_pretrain.pth", "dinov3_vitl16_pretrain_lvd1689m.pth"])
def test_older_file_names_in_a_url_are_checked_against_the_registry(
    cache_dir: Path, files: FileServer, name: str
) -> None:
    files.put(f"/good/{name}", DATA)
    files.put(f"/bad/{name}", b"another")
    with pytest.raises(CheckpointError, match=sha(DATA)[:8]):
        find(cache_dir, files.url(f"/bad/{name}"))
    assert find(cache_dir, files.url(f"/good/{name}")).label == LVD_NAME
    assert find(cache_dir, offline=True).path == cache_dir / "weights" / LVD_NAME


def test_the_file_name_of_a_url_determines_the_dataset(cache_dir: Path, files: FileServer) -> None:
    files.put(f"/{SAT_NAME}", SAT)
    assert find(cache_dir, files.url(f"/{SAT_NAME}")) == (cache_dir / "weights" / SAT_NAME, SAT_NAME)
    assert find(cache_dir, weights_url=files.url(f"/{SAT_NAME}")).label == SAT_NAME
    put(cache_dir, LVD_NAME)  # The URL says which dataset is meant, so this is not it.
    assert find(cache_dir, weights_url=files.url(f"/{SAT_NAME}")).label == SAT_NAME
    files.put("/dinov3_vitl16_pretrain.pth", SAT)
    undated = files.url("/dinov3_vitl16_pretrain.pth")
    assert find(cache_dir / "other", undated, dataset="sat493m").label == SAT_NAME


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        (VARIANTS["dinov3_vitb16"].official_file("lvd1689m"), {}, "Set model to dinov3_vitb16"),
        ("dinov3_vits16plus_pretrain.pth", {}, "Set model to dinov3_vits16plus"),
        (LVD_NAME, {"dataset": "sat493m"}, "Set dataset to lvd1689m"),
        (SAT_NAME, {"dataset": "lvd1689m"}, "Set dataset to sat493m"),
    ],
)
def test_another_models_file_name_is_refused_before_fetching(
    cache_dir: Path, files: FileServer, name: str, settings: dict[str, str], says: str
) -> None:
    files.put(f"/{name}", DATA)
    url = files.url(f"/{name}{SECRET}")
    assert says in refused(ConfigError, cache_dir, url, **settings)
    assert says in refused(ConfigError, cache_dir, weights_url=url, **settings)
    assert not files.requests
    assert not cache_dir.exists()


def test_files_with_the_same_name_are_kept_apart_by_their_url(cache_dir: Path, files: FileServer) -> None:
    for folder in ("a", "b"):
        files.put(f"/{folder}/model.safetensors", folder.encode() * 1000)
    found = [find(cache_dir, files.url(f"/{folder}/model.safetensors{SECRET}")) for folder in ("a", "b")]
    assert [each.path.read_bytes()[:1] for each in found] == [b"a", b"b"]
    assert [each.label for each in found] == ["model.safetensors"] * 2
    again = find(cache_dir, files.url("/a/model.safetensors?Signature=another"))
    assert again == found[0]
    assert len(files.requests) == 2
    known = manifest.read(found[0].path)
    assert known is not None
    assert known.checked_against == "nothing"


def test_the_hash_in_an_unofficial_name_is_checked_too(cache_dir: Path, files: FileServer) -> None:
    files.put("/dinov3_vitl16_pretrain_lvd1689m-deadbeef.pth", DATA)
    with pytest.raises(CheckpointError, match="deadbeef"):
        find(cache_dir, files.url("/dinov3_vitl16_pretrain_lvd1689m-deadbeef.pth"))


@pytest.mark.parametrize("name", ["", "..", ".pth", "a%2Fb.pth", "a%00.pth", "x.pth.part", "x.lock", "x" * 300])
def test_a_url_ends_in_the_name_of_a_file(cache_dir: Path, files: FileServer, name: str) -> None:
    assert "name of a file" in refused(ConfigError, cache_dir, files.url(f"/folder/{name}{SECRET}"))
    assert not files.requests


def test_an_escaped_name(cache_dir: Path, files: FileServer) -> None:
    files.put("/my%20model.pth", DATA)
    assert find(cache_dir, files.url("/my%20model.pth")).label == "my model.pth"


def test_a_file_url_needs_no_network(cache_dir: Path, tmp_path: Path, no_sockets: None) -> None:
    (tmp_path / LVD_NAME).write_bytes(DATA)
    url = (tmp_path / LVD_NAME).as_uri()
    assert find(cache_dir, url, offline=True) == (cache_dir / "weights" / LVD_NAME, LVD_NAME)
    assert find(cache_dir / "other", weights_url=url, offline=True).path.read_bytes() == DATA


def test_a_refused_url_does_not_fall_back(cache_dir: Path, files: FileServer, hub: FakeHub) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA})
    files.always(f"/{LVD_NAME}", Answer(403))
    refused(AccessRefused, cache_dir, files.url(f"/{LVD_NAME}{SECRET}"))
    refused(AccessRefused, cache_dir, weights_url=files.url(f"/{LVD_NAME}{SECRET}"))
    assert not (cache_dir / "weights" / LVD_NAME).exists()
    assert not hub.asked()


# hf://


def test_a_repository(cache_dir: Path, hub: FakeHub) -> None:
    hub.publish("me/tuned", {**SHARDS, **INDEX}, revision="v1")
    found = find(cache_dir, "hf://me/tuned@v1")
    assert found == (cache_dir / "weights" / "me--tuned" / COMMIT, "hf://me/tuned@v1")
    asked = len(hub.asked())
    assert find(cache_dir, "hf://me/tuned@v1") == find(cache_dir, "hf://me/tuned@v1", offline=True) == found
    assert len(hub.asked()) == asked


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("timm/vit_base_patch16_dinov3.lvd1689m", {}, "Set model to dinov3_vitb16"),
        (TIMM, {"dataset": "sat493m"}, "Set dataset to lvd1689m"),
    ],
)
def test_another_models_repository_is_refused(
    cache_dir: Path, hub: FakeHub, name: str, settings: dict[str, str], says: str
) -> None:
    assert says in refused(ConfigError, cache_dir, f"hf://{name}", **settings)
    assert not hub.asked()


def test_a_named_gated_repository_does_not_fall_back(cache_dir: Path, hub: FakeHub) -> None:
    hub.publish(FACEBOOK, {"model.safetensors": DATA})
    hub.gate(FACEBOOK, 401)
    hub.publish(TIMM, {"model.safetensors": DATA})
    assert f"{hub.url}/{FACEBOOK}" in refused(AccessRefused, cache_dir, f"hf://{FACEBOOK}")


# auto


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
