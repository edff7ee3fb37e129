"""Using weights in the user's own Hugging Face cache instead of fetching them."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants

from dinov3_server.config.settings import Settings
from dinov3_server.provision import manifest
from dinov3_server.provision.hub import fetch, find, find_in_hf_cache
from dinov3_server.provision.hub_api import Repository
from dinov3_server.provision.manifest import CheckOptions
from dinov3_server.provision.weights import find_or_fetch
from tests.server.provision.weights_rig import DATA, FACEBOOK, INDEX, SHARDS, TIMM, sha, variant
from tests.support.fake_hub import COMMIT, FakeHub

OPTIONS = CheckOptions("dinov3-server weights --model vitl16")
REPO = Repository(TIMM)
FOLDER = f"weights/{TIMM.replace('/', '--')}/{COMMIT}"
SINGLE = {"model.safetensors": DATA}


def fill_hf_cache(files: Mapping[str, bytes], repository: str = TIMM, *, links: bool = True) -> Path:
    """Lay files out as huggingface_hub does: snapshots of links to blobs, which are named by their hashes."""
    root = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    for name, data in files.items():
        blob = root / "blobs" / (sha(data) if name.endswith(".safetensors") else "b" * 40)
        blob.write_bytes(data)
        if links:
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
        else:
            blob.rename(snapshot / name)
    return root


def test_a_file_is_linked_and_checked_without_a_connection(
    tmp_path: Path, no_sockets: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    root = fill_hf_cache(SINGLE)
    before = sorted(root.rglob("*"))
    path = find_in_hf_cache(tmp_path, REPO, OPTIONS)
    assert path == tmp_path / FOLDER / "model.safetensors"
    assert path.samefile(root / "blobs" / sha(DATA))
    assert not path.is_symlink()
    known = manifest.read(path)
    assert known is not None
    assert (known.source, known.sha256) == (f"hf://{TIMM}@{COMMIT}/model.safetensors", sha(DATA))
    assert known.checked_against == "hub"
    assert f"commit {COMMIT} is in the Hugging Face cache, {root}" in caplog.text
    assert sorted(root.rglob("*")) == before
    shutil.rmtree(root)
    assert find(tmp_path, REPO, OPTIONS) == path
    assert path.read_bytes() == DATA


def test_shards_are_linked(tmp_path: Path, no_sockets: None) -> None:
    fill_hf_cache({**SHARDS, **INDEX})
    folder = find_in_hf_cache(tmp_path, REPO, OPTIONS)
    assert folder == tmp_path / FOLDER
    assert find(tmp_path, REPO, OPTIONS) == find(tmp_path, Repository(TIMM, COMMIT), OPTIONS) == folder
    assert all((folder / name).read_bytes() == data for name, data in {**SHARDS, **INDEX}.items())


def test_a_file_on_another_disk_is_copied(tmp_path: Path, no_sockets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    root = fill_hf_cache(SINGLE)
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    path = find_in_hf_cache(tmp_path, REPO, OPTIONS)
    assert path is not None
    assert path.read_bytes() == DATA
    assert not path.samefile(root / "blobs" / sha(DATA))
    assert find(tmp_path, REPO, OPTIONS) == path


def test_a_cache_without_links_gives_no_hash_to_check_against(tmp_path: Path, no_sockets: None) -> None:
    fill_hf_cache(SINGLE, links=False)
    path = find_in_hf_cache(tmp_path, REPO, OPTIONS)
    assert path is not None
    known = manifest.read(path)
    assert known is not None
    assert (known.sha256, known.checked_against) == (sha(DATA), "nothing")


def test_a_damaged_file_is_not_used_but_fetched(hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.publish(TIMM, SINGLE)
    root = fill_hf_cache(SINGLE)
    (root / "blobs" / sha(DATA)).write_bytes(b"damaged")
    assert find_in_hf_cache(tmp_path, REPO, OPTIONS) is None
    assert f"it has the sha256 {sha(b'damaged')} and should have {sha(DATA)}" in caplog.text
    assert fetch(tmp_path, REPO, OPTIONS).read_bytes() == DATA
    assert hub.fetched() == ["model.safetensors"]


def test_only_missing_shards_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {**SHARDS, **INDEX})
    first, *others = SHARDS
    fill_hf_cache({first: SHARDS[first], **INDEX})
    assert find_in_hf_cache(tmp_path, REPO, OPTIONS) is None
    assert not (tmp_path / "weights").exists()
    fetch(tmp_path, REPO, OPTIONS)
    assert hub.fetched() == others


@pytest.mark.parametrize("index", [b"not JSON", b'{"weight_map": {"a": "../../../x.safetensors"}}'])
def test_a_damaged_index_is_not_used(tmp_path: Path, no_sockets: None, index: bytes) -> None:
    fill_hf_cache({**SHARDS, "model.safetensors.index.json": index})
    assert find_in_hf_cache(tmp_path, REPO, OPTIONS) is None


def test_an_empty_or_missing_cache_has_nothing(tmp_path: Path, no_sockets: None) -> None:
    assert find_in_hf_cache(tmp_path, REPO, OPTIONS) is None
    fill_hf_cache({"config.json": b"{}"})
    assert find_in_hf_cache(tmp_path, REPO, OPTIONS) is None
    assert find_in_hf_cache(tmp_path, Repository("a/" + "b" * 100), OPTIONS) is None  # the library refuses the name


@pytest.mark.parametrize("repository", [FACEBOOK, TIMM])
@pytest.mark.parametrize("source", ["auto", "named"])
@pytest.mark.parametrize("offline", [True, False])
def test_every_source_looks_there_before_it_fetches(
    tmp_path: Path, no_sockets: None, repository: str, source: str, offline: bool
) -> None:
    fill_hf_cache(SINGLE, repository)
    weights = f"hf://{repository}" if source == "named" else "auto"
    settings = Settings(cache_dir=str(tmp_path / "cache"), weights=weights, offline=offline)
    for _ in range(2):
        found = find_or_fetch(settings, variant())
        assert found.label == f"hf://{repository}"
        assert found.path.read_bytes() == DATA
