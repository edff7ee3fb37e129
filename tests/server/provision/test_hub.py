"""Fetching Hugging Face repositories, with the real huggingface_hub and a fake hub on loopback."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dinov3_server.errors import AccessRefused, CheckpointError, ConfigError, StartupError, StorageError, Unreachable
from dinov3_server.provision import hub as hub_module
from dinov3_server.provision import hub_api, manifest
from dinov3_server.provision.hub import REPOSITORIES, fetch, find, parse
from dinov3_server.provision.hub_api import Repository, TokenRefused
from dinov3_server.provision.manifest import CheckOptions
from tests.server.provision.weights_rig import DATA, INDEX, SHARDS, TIMM, TOKEN, everything_written, sha
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.file_server import Answer

OPTIONS = CheckOptions("dinov3-server weights --model vitl16")
REPO = Repository(TIMM)
FOLDER = "weights/timm--vit_large_patch16_dinov3.lvd1689m"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_api, "RETRY_PAUSES", (0.0, 0.0))


def refuses(cache_dir: Path, kind: type[StartupError], repository: Repository = REPO) -> str:
    """Return the message of the error, after checking that it is one line without the token."""
    with pytest.raises(kind) as caught:
        fetch(cache_dir, repository, OPTIONS)
    message = str(caught.value)
    assert type(caught.value) in (kind, *kind.__subclasses__())
    assert TOKEN not in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_a_single_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA, "config.json": b"{}", "README.md": b"x"})
    path = fetch(tmp_path, REPO, OPTIONS)
    assert path == tmp_path / FOLDER / COMMIT / "model.safetensors"
    assert path.read_bytes() == DATA
    known = manifest.read(path)
    assert known is not None
    assert (known.source, known.sha256) == (f"hf://{TIMM}@{COMMIT}/model.safetensors", sha(DATA))
    assert known.checked_against == "hub"
    assert hub.fetched() == ["model.safetensors"]


def test_shards(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {**SHARDS, **INDEX, "other.safetensors": b"not in the index"})
    folder = fetch(tmp_path, REPO, OPTIONS)
    assert folder == tmp_path / FOLDER / COMMIT
    for name, data in {**SHARDS, **INDEX}.items():
        assert (folder / name).read_bytes() == data
        known = manifest.read(folder / name)
        assert known is not None
        assert known.checked_against == ("hub" if name in SHARDS else "nothing")
    assert hub.fetched() == list(SHARDS)
    assert find(tmp_path, REPO, OPTIONS) == folder


def test_a_single_file_is_preferred_to_shards(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {**SHARDS, **INDEX, "model.safetensors": DATA})
    assert fetch(tmp_path, REPO, OPTIONS).name == "model.safetensors"
    assert hub.fetched() == ["model.safetensors"]


def test_fetched_weights_are_found_without_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(TIMM, {**SHARDS, **INDEX})
    path = fetch(tmp_path, REPO, OPTIONS)
    hub.publish(TIMM, {"model.safetensors": DATA}, commit="b" * 40)  # The branch has moved on.
    asked = len(hub.asked())
    assert find(tmp_path, REPO, OPTIONS) == fetch(tmp_path, REPO, OPTIONS) == path
    assert find(tmp_path, Repository(TIMM, COMMIT), OPTIONS) == path
    assert find(tmp_path, Repository(TIMM, "b" * 40), OPTIONS) is None
    assert find(tmp_path, Repository(TIMM, "other"), OPTIONS) is None
    assert len(hub.asked()) == asked


@pytest.mark.parametrize("lost", [*INDEX, *SHARDS])
@pytest.mark.parametrize("what", ["file", "manifest"])
def test_only_missing_files_are_fetched_again(hub: FakeHub, tmp_path: Path, lost: str, what: str) -> None:
    hub.publish(TIMM, {**SHARDS, **INDEX})
    folder = fetch(tmp_path, REPO, OPTIONS)
    before = len(hub.fetched())
    (folder / lost if what == "file" else folder / f"{lost}.manifest.json").unlink()
    assert find(tmp_path, REPO, OPTIONS) is None
    assert fetch(tmp_path, REPO, OPTIONS) == folder
    assert hub.fetched()[before:] == ([lost] if what == "file" and lost in SHARDS else [])
    assert find(tmp_path, REPO, OPTIONS) == folder


def test_a_revision(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA}, revision="refs%2Fpr%2F1", commit="a" * 40)
    pinned = Repository(TIMM, "refs/pr/1")
    path = fetch(tmp_path, pinned, OPTIONS)
    assert path.parent.name == "a" * 40
    assert (tmp_path / FOLDER / "refs" / "refs%2Fpr%2F1").read_text() == "a" * 40 + "\n"
    assert find(tmp_path, pinned, OPTIONS) == path
    assert find(tmp_path, REPO, OPTIONS) is None


def test_a_changed_file_is_an_error_and_is_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA})
    path = fetch(tmp_path, REPO, OPTIONS)
    path.write_bytes(DATA + b"!")
    with pytest.raises(CheckpointError, match="bytes, and its manifest of"):
        find(tmp_path, REPO, OPTIONS)
    assert path.read_bytes() == DATA + b"!"


def test_a_download_with_another_hash_than_the_hubs_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA}, wrong_hashes=True)
    with pytest.raises(CheckpointError) as caught:
        fetch(tmp_path, REPO, OPTIONS)
    assert sha(b"another")[:8] in str(caught.value)
    assert not (tmp_path / FOLDER / COMMIT / "model.safetensors").exists()
    assert find(tmp_path, REPO, OPTIONS) is None


def test_an_existing_file_with_another_hash_than_the_hubs_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA})
    path = tmp_path / FOLDER / COMMIT / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    assert f"the hub says that it begins with {sha(DATA)}" in refuses(tmp_path, CheckpointError)
    assert path.read_bytes() == b"something else"
    assert hub.fetched() == []


def test_the_token_is_sent_to_the_hub_only(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.publish(TIMM, {**SHARDS, **INDEX})
    fetch(tmp_path, REPO, OPTIONS)
    assert {seen.headers.get("authorization") for seen in hub.asked()} == {f"Bearer {TOKEN}"}
    assert hub.cdn.requests
    assert all("authorization" not in seen.headers for seen in hub.cdn.requests)
    written = everything_written(tmp_path)
    assert COMMIT in written
    assert TOKEN not in written + caplog.text
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("dinov3_server")]
    assert ours
    assert "cdn-secret" not in "\n".join([written, *ours])


def test_the_token_file_is_read_and_anonymous_sends_none(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub_api.token() is None
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert hub_api.token() == TOKEN
    hub.publish(TIMM, {"model.safetensors": DATA})
    fetch(tmp_path, REPO, OPTIONS, anonymous=True)
    assert all("authorization" not in seen.headers for seen in hub.asked())
    fetch(tmp_path / "other", REPO, OPTIONS)
    assert hub.asked()[-1].headers["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_repository(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.publish(TIMM, {"model.safetensors": DATA})
    hub.gate(TIMM, 403 if token else 401)
    message = refuses(tmp_path, AccessRefused)
    assert ("the token that was sent has no access" if token else "no token was sent") in message
    for part in (f"{hub.url}/{TIMM}", f"{hub.url}/settings/tokens", "HF_TOKEN", "`hf auth login`"):
        assert part in message
    assert hub.fetched() == []


def test_an_invalid_token(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.publish(TIMM, {"model.safetensors": DATA})
    hub.refuse_token(TIMM)
    message = refuses(tmp_path, TokenRefused)
    assert "does not accept the token" in message
    assert f"{hub.url}/settings/tokens" in message
    assert "`hf auth logout`" in message


def test_a_token_without_the_permission_gets_the_hubs_own_message(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = f"Please enable access to public gated repositories in your settings, {TOKEN}."
    hub.hub.always(hub.api(TIMM), hub.refusal(403, None, words))
    message = refuses(tmp_path, AccessRefused)
    assert "Please enable access to public gated repositories in your settings, ...." in message


@pytest.mark.parametrize(
    ("status", "code", "kind", "says"),
    [
        (401, None, ConfigError, "there is no repository"),
        (404, "RepoNotFound", ConfigError, "there is no repository"),
        (404, None, ConfigError, "there is no repository"),
        (404, "RevisionNotFound", ConfigError, "has no revision 'main'"),
        (403, "GatedRepo", AccessRefused, "gated"),
        (403, None, AccessRefused, "forbids"),
        (410, None, Unreachable, "status 410"),
        (429, None, Unreachable, "too many requests"),
    ],
)
def test_each_refusal_has_its_message_and_is_not_retried(
    hub: FakeHub, tmp_path: Path, status: int, code: str | None, kind: type[StartupError], says: str
) -> None:
    hub.hub.always(hub.api(TIMM), hub.refusal(status, code, "Words of the hub."))
    message = refuses(tmp_path, kind)
    assert says in message
    assert TIMM in message
    assert hub.url in message
    assert len(hub.asked()) == 1


def test_a_disabled_repository(hub: FakeHub, tmp_path: Path) -> None:
    hub.hub.always(hub.api(TIMM), hub.refusal(403, None, "Access to this resource is disabled."))
    assert "was disabled by Hugging Face" in refuses(tmp_path, AccessRefused)


def test_a_file_that_is_listed_but_missing(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA})
    hub.hub.always(f"/{TIMM}/resolve/{COMMIT}/model.safetensors", hub.refusal(404, "EntryNotFound", "Entry not found"))
    assert "does not have the file" in refuses(tmp_path, ConfigError)


def test_a_repository_without_weights(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {"pytorch_model.bin": DATA, "config.json": b"{}"})
    message = refuses(tmp_path, ConfigError)
    assert "neither model.safetensors nor model.safetensors.index.json" in message
    assert "config.json, pytorch_model.bin" in message
    assert hub.fetched() == []


@pytest.mark.parametrize(
    "answer",
    [Answer(hang_up=True), Answer(503, body=b"{}"), Answer(500, body=b"<html>")],
    ids=["no answer", "503", "500"],
)
def test_temporary_failures_are_retried(
    hub: FakeHub, tmp_path: Path, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA})
    hub.hub.script(hub.api(TIMM), answer, answer)
    assert fetch(tmp_path, REPO, OPTIONS).read_bytes() == DATA
    assert caplog.text.count("trying again") == 2


def test_a_hub_that_keeps_failing(hub: FakeHub, tmp_path: Path) -> None:
    hub.hub.always(hub.api(TIMM), Answer(502))
    assert "status 502" in refuses(tmp_path, Unreachable)
    assert len(hub.asked()) == 3


def test_an_unreachable_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@127.0.0.1:1")
    message = refuses(tmp_path, Unreachable)
    assert "http://127.0.0.1:1 cannot be reached" in message
    assert "HF_ENDPOINT" in message
    assert "secret" not in message


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"[]", b"{}", b'{"id": "x", "sha": "main"}'])
def test_an_answer_that_is_not_the_hubs(hub: FakeHub, tmp_path: Path, body: bytes) -> None:
    hub.hub.put(hub.api(TIMM), body)
    message = refuses(tmp_path, Unreachable)
    assert "not like the hub" in message or "does not speak the hub's API" in message


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "folder/x.safetensors", "..safetensors", "/etc/x.safetensors", "run.py", 1, {}]
)
def test_an_index_with_unsafe_file_names_is_refused(hub: FakeHub, tmp_path: Path, name: object) -> None:
    index = json.dumps({"weight_map": {"good": next(iter(SHARDS)), "bad": name}}).encode()
    hub.publish(TIMM, {**SHARDS, str(name): b"evil", "model.safetensors.index.json": index})
    message = refuses(tmp_path, CheckpointError)
    assert "only .safetensors files are fetched" in message or "allowed are plain names" in message
    assert hub.fetched() == []


@pytest.mark.parametrize("index", [{"weight_map": {}}, {"weight_map": []}, [], {}, "x"])
def test_a_malformed_index_is_refused(hub: FakeHub, tmp_path: Path, index: object) -> None:
    hub.publish(TIMM, {**SHARDS, "model.safetensors.index.json": json.dumps(index).encode()})
    assert "weight_map" in refuses(tmp_path, CheckpointError)
    assert hub.fetched() == []


def test_an_index_with_a_missing_shard_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, dict([*INDEX.items(), *list(SHARDS.items())[:2]]))
    assert "'model-00003-of-00003.safetensors', which is not in the repository" in refuses(tmp_path, CheckpointError)


def test_disk_space_is_checked_for_all_shards_before_any_is_fetched(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def full(folder: Path, nbytes: int, what: str) -> None:
        asked.append(nbytes)
        raise StorageError("too little")

    hub.publish(TIMM, {**SHARDS, **INDEX})
    place = tmp_path / FOLDER / COMMIT
    place.mkdir(parents=True)
    names = list(SHARDS)
    (place / names[0]).write_bytes(SHARDS[names[0]])
    (place / (names[1] + ".part")).write_bytes(b"x" * 1000)
    monkeypatch.setattr(hub_module, "check_space", full)
    refuses(tmp_path, StorageError)
    assert asked == [100_000 - 1000 + 150_000]
    assert hub.fetched() == []


@pytest.mark.parametrize(
    ("url", "name", "revision"),
    [
        ("hf://timm/vit_base.lvd1689m", "timm/vit_base.lvd1689m", "main"),
        ("hf://a/b@main", "a/b", "main"),
        ("hf://a/b@v1.0", "a/b", "v1.0"),
        ("hf://a/b@refs/pr/1", "a/b", "refs/pr/1"),
    ],
)
def test_urls_of_repositories(url: str, name: str, revision: str) -> None:
    assert parse(url) == Repository(name, revision)
    assert str(parse(url)) == url.removesuffix("@main")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "hf://",
            "hf://a",
            "hf://a/b/c",
            "hf://a/..",
            "hf://../b",
            "hf:///b",
            "hf://a--b/c",
            "hf://a/b c",
            "hf://a/b?x",
        ),
        *("hf://a/b@", "hf://a/b@..", "hf://a/b@.", "hf://a/b@x/../y", "hf://a/b@-x", "hf://a/b@x?y", "hf://a/b@x y"),
        *("hf://a/b@x@y", "hf://a/b%20c", "hf://a/b@\0", "hf://user:secret@host/b"),
    ],
)
def test_malformed_repository_urls(url: str) -> None:
    with pytest.raises(ConfigError, match=r"hf://OWNER/REPO@REVISION"):
        parse(url)


def test_a_repository_name_that_the_library_refuses(hub: FakeHub, tmp_path: Path) -> None:
    assert "does not name a repository" in refuses(tmp_path, ConfigError, Repository("a/" + "b" * 100))
    assert hub.asked() == []


def test_the_repositories_are_those_of_meta_and_timm() -> None:
    names = {key: (gated.name, ungated.name) for key, (gated, ungated) in REPOSITORIES.items()}
    assert names["dinov3_vitb16", "lvd1689m"] == (
        "facebook/dinov3-vitb16-pretrain-lvd1689m",
        "timm/vit_base_patch16_dinov3.lvd1689m",
    )
    assert names["dinov3_vit7b16", "sat493m"] == (
        "facebook/dinov3-vit7b16-pretrain-sat493m",
        "timm/vit_7b_patch16_dinov3.sat493m",
    )
    assert names["dinov3_convnext_tiny", "lvd1689m"] == (
        "facebook/dinov3-convnext-tiny-pretrain-lvd1689m",
        "timm/convnext_tiny.dinov3_lvd1689m",
    )
    assert len(names) == 12
    assert ("dinov3_vitl16plus", "lvd1689m") not in names


def test_a_token_is_not_sent_if_implicit_tokens_are_disabled(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert hub_api.token() is None


def test_a_slow_mirror_is_given_the_time_of_huggingface_hubs_setting(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA})
    hub.hub.always(hub.api(TIMM), Answer(hold_after=0))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.05")
    message = refuses(tmp_path, Unreachable)
    assert "If it is a mirror that fetches files itself before it answers, give it more than 0.05 s: " in message
    assert "HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT, in seconds" in message
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "soon")
    assert "HF_HUB_ETAG_TIMEOUT is 'soon'" in refuses(tmp_path, ConfigError)
