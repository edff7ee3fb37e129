"""The sources of weights that a user names: paths, URLs and repositories."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dinov3_server.errors import AccessRefused, CheckpointError, ConfigError, StorageError
from dinov3_server.families.registry import VARIANTS
from dinov3_server.provision import manifest
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
    everything_written,
    find,
    put,
    refused,
    sha,
)
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.file_server import Answer, FileServer

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
