"""Manifests: when a file is hashed, and when its manifest is trusted, renewed or contradicted."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov3_server.errors import CheckpointError, StorageError
from dinov3_server.provision import manifest
from dinov3_server.provision.manifest import CheckOptions, ExpectedHash

DATA = b"weights" * 1000
SHA = hashlib.sha256(DATA).hexdigest()
OPTIONS = CheckOptions("dinov3-server weights --model vitb16")
NOBODY = ExpectedHash()
REGISTRY = ExpectedHash(hash_source="registry", prefixes=(SHA[:8],))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record the files that are hashed."""
    seen: list[Path] = []
    real = manifest.sha256_of

    def spy(file: Path, report: object = None) -> str:
        seen.append(file)
        return real(file)

    monkeypatch.setattr(manifest, "sha256_of", spy)
    return seen


def beside(file: Path) -> Path:
    return file.with_name(file.name + ".manifest.json")


def touch(file: Path, later_ns: int = 10**9) -> None:
    now = file.stat()
    os.utime(file, ns=(now.st_atime_ns, now.st_mtime_ns + later_ns))


def alter(file: Path, **changes: object) -> None:
    beside(file).write_text(json.dumps({**json.loads(beside(file).read_text()), **changes}))


def test_the_content_of_a_manifest(file: Path) -> None:
    manifest.write(file, "https://host/model.pth?...", SHA, "registry")
    held = json.loads(beside(file).read_text())
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", held.pop("time"))
    assert held == {
        "source": "https://host/model.pth?...",
        "size": len(DATA),
        "sha256": SHA,
        "mtime_ns": file.stat().st_mtime_ns,
        "checked_against": "registry",
    }


def test_an_unchanged_file_is_not_read(file: Path, hashed: list[Path]) -> None:
    manifest.write(file, "somewhere", SHA, "registry")
    before = beside(file).stat()
    for promise in (NOBODY, REGISTRY):
        assert manifest.check(file, promise, OPTIONS).sha256 == SHA
    assert not hashed
    assert beside(file).stat().st_mtime_ns == before.st_mtime_ns


def test_verify_full_reads_an_unchanged_file(file: Path, hashed: list[Path]) -> None:
    manifest.write(file, "somewhere", SHA, "registry")
    assert manifest.check(file, NOBODY, CheckOptions("", full=True)).sha256 == SHA
    assert hashed == [file]


def test_verify_full_finds_changed_bytes_with_the_same_size_and_time(file: Path) -> None:
    manifest.write(file, "somewhere", SHA, "nothing")
    status = file.stat()
    file.write_bytes(DATA[:-1] + b"X")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    manifest.check(file, NOBODY, OPTIONS)
    with pytest.raises(CheckpointError, match=f"its manifest of .* says {SHA}"):
        manifest.check(file, NOBODY, CheckOptions("", full=True))


def test_a_file_without_a_manifest_is_hashed_once(file: Path, hashed: list[Path]) -> None:
    assert manifest.check(file, REGISTRY, OPTIONS).checked_against == "registry"
    again = manifest.check(file, REGISTRY, OPTIONS)
    assert hashed == [file]
    assert (again.source, again.sha256, again.checked_against) == ("put there by hand", SHA, "registry")


def test_another_time_renews_the_manifest_and_keeps_its_source(file: Path, hashed: list[Path]) -> None:
    manifest.write(file, "https://host/x", SHA, "hub")
    touch(file)
    for _ in range(2):
        known = manifest.check(file, NOBODY, OPTIONS)
        assert (known.source, known.checked_against) == ("https://host/x", "hub")
    assert hashed == [file]
    assert manifest.read(file) == known


def test_another_size_is_refused_without_reading(file: Path, hashed: list[Path]) -> None:
    manifest.write(file, "somewhere", SHA, "nothing")
    file.write_bytes(DATA[:-7])
    with pytest.raises(CheckpointError, match=r"has 6,993 bytes, and its manifest of .* says 7,000") as caught:
        manifest.check(file, NOBODY, OPTIONS)
    assert f"`mv {file} {file}.bad`" in str(caught.value)
    assert f"`{OPTIONS.fetch_command}`" in str(caught.value)
    assert not hashed
    assert file.stat().st_size == len(DATA) - 7


def test_other_bytes_are_refused(file: Path) -> None:
    manifest.write(file, "somewhere", SHA, "nothing")
    file.write_bytes(b"X" * len(DATA))
    touch(file)
    with pytest.raises(CheckpointError) as caught:
        manifest.check(file, NOBODY, OPTIONS)
    assert SHA in str(caught.value)
    assert hashlib.sha256(b"X" * len(DATA)).hexdigest() in str(caught.value)


@pytest.mark.parametrize("written", [True, False], ids=["with a manifest", "without"])
def test_the_registry_outweighs_the_manifest(file: Path, written: bool) -> None:
    other = ExpectedHash(hash_source="registry", prefixes=("deadbeef", "0badcafe"))
    if written:
        manifest.write(file, "somewhere", SHA, "nothing")
    with pytest.raises(CheckpointError, match="the registry says that it begins with deadbeef or 0badcafe") as caught:
        manifest.check(file, other, OPTIONS)
    assert SHA in str(caught.value)
    assert file.read_bytes() == DATA
    assert beside(file).exists() == written


def test_a_false_manifest_does_not_make_a_wrong_file_pass(file: Path) -> None:
    file.write_bytes(b"X" * len(DATA))
    manifest.write(file, "somewhere", "0" * 64, "registry")
    with pytest.raises(CheckpointError, match=f"begins with {SHA[:8]}"):
        manifest.check(file, REGISTRY, OPTIONS)


def test_a_false_manifest_does_not_make_a_good_file_fail(file: Path) -> None:
    manifest.write(file, "somewhere", "0" * 64, "registry")
    assert manifest.check(file, REGISTRY, OPTIONS).sha256 == SHA
    assert manifest.read(file) == manifest.check(file, REGISTRY, OPTIONS)


def test_a_good_file_that_replaces_a_bad_one_passes_despite_the_old_manifest(file: Path) -> None:
    manifest.write(file, "somewhere", "0" * 64, "nothing")
    alter(file, size=17)
    assert manifest.check(file, REGISTRY, OPTIONS).size == len(DATA)


def text(**changes: object) -> bytes:
    good = {"source": "x", "size": 7000, "sha256": SHA, "time": "t", "mtime_ns": 1, "checked_against": "registry"}
    return json.dumps(good | changes).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        text()[:-1],
        text(sha256="short"),
        text(size="7000"),
        text(mtime_ns=True),
        text(checked_against="me"),
        text(more=1),
        b"[" * 100_000,
    ],
    ids=["empty", "not text", "a list", "no keys", "cut", "sha256", "size", "time", "authority", "another key", "deep"],
)
def test_an_unreadable_manifest_is_written_again(
    file: Path, content: bytes, hashed: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    beside(file).write_bytes(content)
    assert manifest.check(file, REGISTRY, OPTIONS).sha256 == SHA
    assert f"{beside(file)} is not a manifest" in caplog.text
    assert manifest.read(file) is not None
    assert hashed == [file]


def test_a_failure_to_write_a_manifest_is_only_a_warning(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(path: Path, data: bytes) -> None:
        raise StorageError(f"{path}: the file system is read-only")

    monkeypatch.setattr(manifest, "write_atomic", read_only)
    with caplog.at_level(logging.WARNING):
        assert manifest.check(file, REGISTRY, OPTIONS).sha256 == SHA
    assert "is hashed at every start" in caplog.text
    assert "read-only" in caplog.text


def test_a_good_file_needs_no_write(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest.write(file, "somewhere", SHA, "registry")
    monkeypatch.setattr(manifest, "write_atomic", None)
    assert manifest.check(file, REGISTRY, CheckOptions("", full=True)).sha256 == SHA


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(StorageError, match=r"folder\.pth"):
        manifest.check(tmp_path / "folder.pth", REGISTRY, OPTIONS)


def test_long_checks_report_progress(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 2.0

    clock = ticks()
    monkeypatch.setattr(manifest.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(manifest, "_CHUNK", 1000)
    said: list[str] = []
    assert manifest.sha256_of(file, said.append) == SHA
    assert said[0] == "checking 7 kB"
    assert said[1].startswith("14 % of 7 kB")
