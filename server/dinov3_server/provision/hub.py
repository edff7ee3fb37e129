"""Find and fetch weights from Hugging Face repositories.

Layout: `CACHE_DIR/weights/OWNER--REPO/COMMIT/` has the files of a commit, and `CACHE_DIR/weights/OWNER--REPO/refs/` has
a file for each branch or tag that was resolved, with its commit. So a repository is resolved once: later starts open no
connection and do not even import `huggingface_hub`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

from dinov3_server.config.types import without_secrets
from dinov3_server.errors import CheckpointError, ConfigError
from dinov3_server.families.registry import VARIANTS
from dinov3_server.models.variant import DatasetName
from dinov3_server.models.weight_files import INDEX, SINGLE, read_weight_map
from dinov3_server.provision import hf_cache, manifest
from dinov3_server.provision.download import Expected
from dinov3_server.provision.hub_api import COMMIT, HubApi, Repository
from dinov3_server.provision.manifest import CheckOptions, ExpectedHash, HashSource
from dinov3_server.storage import check_space, locked, storage_errors, write_atomic

log = logging.getLogger(__name__)

_TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its environment
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


# The repositories of each variant and dataset. dinov3_vitl16plus has none.
REPOSITORIES: Mapping[tuple[str, DatasetName], tuple[Repository, ...]] = MappingProxyType(
    {
        (variant.name, dataset): tuple(Repository(name.format(dataset=dataset)) for name in variant.repositories)
        for variant in VARIANTS.values()
        for dataset in variant.hashes
        if variant.repositories
    }
)


def parse(url: str) -> Repository:
    """Parse hf://OWNER/REPO[@REVISION]. Raises ConfigError."""
    name, at, revision = url.removeprefix("hf://").partition("@")
    parts = name.split("/")
    good = len(parts) == 2 and all(_NAME.fullmatch(part) and ".." not in part and "--" not in part for part in parts)
    if not good or (at and (not _REVISION.fullmatch(revision) or ".." in revision)):
        raise ConfigError(
            f"weights is {without_secrets(url)!r}, which does not name a repository; allowed: hf://OWNER/REPO or "
            "hf://OWNER/REPO@REVISION, for example hf://timm/vit_base_patch16_dinov3.lvd1689m@main"
        )
    return Repository(name, revision or "main")


def offline_variable() -> str | None:
    """Return the environment variable that forbids connections to the hub, if one is set."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in _TRUE:
            return variable
    return None


def find(cache_dir: Path, repository: Repository, options: CheckOptions) -> Path | None:
    """Return the path of the repository's weights in the cache folder, checked: a file, or a folder of shards.

    Returns None if a file or its manifest is missing. Opens no connection. Raises CheckpointError for a file that has
    changed.
    """
    folder = _folder(cache_dir, repository)
    commit = repository.revision
    if not COMMIT.fullmatch(commit):
        ref = _ref(folder, repository)
        with storage_errors(ref):
            if not ref.exists():
                return None
            commit = ref.read_text("ascii", "replace").strip()
        if not COMMIT.fullmatch(commit):
            return None
    place = folder / commit
    if _is_checked(place / SINGLE, options):
        names, found = [SINGLE], place / SINGLE
    elif _is_checked(place / INDEX, options):
        names, found = [INDEX, *_shards(place / INDEX)], place
    else:
        return None
    if not all(_is_checked(place / name, options) for name in names[1:]):
        return None
    log.info("%s: commit %s is in %s", repository, commit, place)
    return found


def find_in_hf_cache(cache_dir: Path, repository: Repository, options: CheckOptions) -> Path | None:
    """Link the weights from the user's own Hugging Face cache, if all of them are there, and return their path.

    Opens no connection. Raises as `find`, and StorageError.
    """
    name, first = next(
        ((name, path) for name in (SINGLE, INDEX) if (path := hf_cache.locate(repository, name))), ("", None)
    )
    if first is None or not COMMIT.fullmatch(commit := first.parent.name):
        return None
    try:
        names = [name] if name == SINGLE else [name, *_shards(first)]
    except CheckpointError as error:
        log.warning("%s; the Hugging Face cache is not used", error)
        return None
    if not all((first.parent / name).exists() for name in names):
        return None
    with _locked(cache_dir, repository) as folder:
        if found := find(cache_dir, repository, options):  # another process did the same in the meantime
            return found
        log.info("%s: commit %s is in the Hugging Face cache, %s", repository, commit, first.parent)
        place = _make_place(folder, commit)
        for name in names:
            expected = hf_cache.expected(first.parent / name)
            if not _obtain(place / name, repository, expected, options):
                return None
        _write_ref(folder, repository, commit)
    return place / SINGLE if names == [SINGLE] else place


def fetch(cache_dir: Path, repository: Repository, options: CheckOptions, *, anonymous: bool = False) -> Path:
    """Return the path that `find` would, after fetching the files that are missing. `anonymous` sends no token.

    Raises AccessRefused (TokenRefused if only the token is at fault), ConfigError for a repository, revision or file
    that does not exist, Unreachable, CheckpointError and StorageError.
    """
    with _locked(cache_dir, repository) as folder:
        if found := find(cache_dir, repository, options):  # another process fetched it in the meantime
            return found
        api = HubApi(repository, anonymous)
        commit, files = api.listing()
        log.info("%s is commit %s at %s; fetching its weights into %s", repository, commit, api.shown, folder)
        place = _make_place(folder, commit)

        def obtain(name: str) -> None:
            def download(target: Path) -> str:
                return api.download(name, commit, target, files[name], options.on_progress)

            _obtain(place / name, repository, files[name], options, download)

        if SINGLE in files:
            names, found = [SINGLE], place / SINGLE
        elif INDEX in files:
            obtain(INDEX)
            names, found = _shards(place / INDEX), place
            if absent := [name for name in names if name not in files]:
                raise CheckpointError(f"{repository}: its {INDEX} names {absent[0]!r}, which is not in the repository")
        else:
            held = ", ".join(sorted(files)[:8]) or "nothing"
            raise ConfigError(f"{repository} has neither {SINGLE} nor {INDEX}; it holds {held}")
        missing = [name for name in names if not (place / name).exists()]
        check_space(place, sum(_remaining(place / name, files[name]) for name in missing), str(repository))
        for name in names:
            obtain(name)
        _write_ref(folder, repository, commit)
    return found


def _obtain(
    target: Path,
    repository: Repository,
    expected: Expected,
    options: CheckOptions,
    download: Callable[[Path], str] | None = None,
) -> bool:
    """Check a file that exists; else take it from the Hugging Face cache, else download it. Write its manifest.

    Returns whether the file is there.
    """
    commit = target.parent.name
    source = f"hf://{repository.name}@{commit}/{target.name}"
    hash_source: HashSource = "hub" if expected.sha256 else "nothing"
    if target.exists():
        prefixes = (expected.sha256,) if expected.sha256 else ()
        manifest.check(target, ExpectedHash(source, hash_source, prefixes), options)
        return True
    sha256 = hf_cache.take(Repository(repository.name, commit), target, expected, options.on_progress)
    if sha256 is None and download is not None:
        sha256 = download(target)
    if sha256 is None:
        return False
    manifest.write(target, source, sha256, hash_source)
    return True


def _shards(index: Path) -> list[str]:
    """Return the file names in an index, sorted. Raises CheckpointError for any that is not a .safetensors file."""
    names = sorted(set(read_weight_map(index).values()))
    for name in names:
        if not _SHARD.fullmatch(name) or ".." in name:
            raise CheckpointError(f"{index}: names the file {name!r}; only .safetensors files are fetched")
    return names


def _is_checked(file: Path, options: CheckOptions) -> bool:
    """Check a file against its manifest. Returns False if either is missing."""
    if not file.exists() or manifest.read(file) is None:
        return False
    manifest.check(file, ExpectedHash(), options)
    return True


@contextmanager
def _locked(cache_dir: Path, repository: Repository) -> Iterator[Path]:
    """Hold the lock of the repository's folder, which is returned."""
    folder = _folder(cache_dir, repository)
    with locked(folder.with_name(folder.name + ".lock"), f"fetching {repository}"):
        yield folder


def _folder(cache_dir: Path, repository: Repository) -> Path:
    return cache_dir / "weights" / repository.name.replace("/", "--")


def _make_place(folder: Path, commit: str) -> Path:
    place = folder / commit
    with storage_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    return place


def _ref(folder: Path, repository: Repository) -> Path:
    return folder / "refs" / quote(repository.revision, safe="")


def _write_ref(folder: Path, repository: Repository, commit: str) -> None:
    if commit != repository.revision:
        write_atomic(_ref(folder, repository), commit.encode() + b"\n")


def _remaining(target: Path, expected: Expected) -> int:
    part = target.with_name(target.name + ".part")
    return max((expected.size or 0) - (part.stat().st_size if part.exists() else 0), 0)
