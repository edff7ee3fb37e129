"""Find or fetch the weights of a model, and check them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from dinov3_server.config.load import nearest
from dinov3_server.config.settings import Settings
from dinov3_server.config.types import without_secrets
from dinov3_server.errors import AccessRefused, ConfigError, StorageError, Unreachable
from dinov3_server.models.variant import DatasetName, Variant
from dinov3_server.provision import hub, manifest
from dinov3_server.provision.download import Expected, download
from dinov3_server.provision.http import META_REQUESTS
from dinov3_server.provision.hub_api import Repository, TokenRefused, token
from dinov3_server.provision.manifest import CheckOptions, ExpectedHash, HashSource
from dinov3_server.storage import locked, storage_errors

log = logging.getLogger(__name__)

# Meta's file names; those of older documents lack the hash, or the dataset too.
_OFFICIAL = re.compile(r"(dinov3_\w+?)_pretrain(?:_(lvd1689m|sat493m))?(?:-([0-9a-f]{8}))?\.pth")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+= -]{0,199}")
_RESERVED = (manifest.SUFFIX, ".part", ".lock")


class Weights(NamedTuple):
    """`path` is a file, or a folder of shards with its index; `label` is the name shown to users."""

    path: Path
    label: str


def find_or_fetch(settings: Settings, variant: Variant, *, on_progress: Callable[[str], None] | None = None) -> Weights:
    """Return the weights of `variant` from the source in `settings.weights`, which is not random:SEED.

    Fetched files are checked and kept in the cache folder, so they are fetched once. `on_progress` gets the progress of
    downloads and checks. Raises ConfigError, Unreachable, AccessRefused, CheckpointError and StorageError.
    """
    search = _Search(settings, variant, on_progress)
    given = settings.weights
    with storage_errors(settings.cache_folder / "weights"):
        if given == "auto":
            return search.auto()
        if given.startswith("hf://"):
            return search.in_repository(hub.parse(given))
        if given.startswith(("https://", "http://", "file://")):
            return search.at_url(given)
    if "://" in given:
        raise ConfigError(
            f"weights is {without_secrets(given)!r}; allowed are URLs that begin with https://, http://, file:// or hf://"
        )
    return _in_place(given)


def _in_place(given: str) -> Weights:
    """Return the user's own file or folder, which is used in place. The loader checks its content."""
    shown = without_secrets(given)
    try:
        path = Path(given).expanduser()
        if path.exists():
            # wget names a file after the end of its URL, signature included.
            return Weights(path, without_secrets(path.absolute().name))
    except OSError as error:
        raise StorageError(f"weights is {shown!r}: {error.strerror} (this process is uid {os.getuid()})") from None
    path = Path(shown).expanduser()
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        raise ConfigError(f"weights is {shown!r}, and there is no folder {path.parent} that can be read") from None
    hint = nearest(path.name, beside) or f"; it holds {', '.join(beside[:8]) or 'nothing'}"
    raise ConfigError(f"weights is {shown!r}, and there is no {path.name!r} in {path.parent.absolute()}{hint}")


class _Search:
    """The search for one variant's weights."""

    def __init__(self, settings: Settings, variant: Variant, on_progress: Callable[[str], None] | None) -> None:
        self._settings = settings
        self._variant = variant
        self._check_dataset(settings.dataset)
        self._cache_dir = settings.cache_folder
        self._folder = self._cache_dir / "weights"
        self._options = CheckOptions(self._command(), full=settings.verify_weights == "full", on_progress=on_progress)

    def auto(self) -> Weights:
        """Try an official file in the cache folder, then `weights_url`, then Hugging Face repositories: those in the
        cache folder, those in the user's Hugging Face cache, and the hub."""
        settings, url = self._settings, self._settings.weights_url
        dataset = self._check_dataset(settings.dataset or (url and self._named_dataset(url)))
        try:
            return self._auto(dataset, url)
        except _Forbidden:
            raise
        except Unreachable as error:
            raise Unreachable(self._how_to_bring(dataset, f"fetching them failed: {error}")) from None

    def _auto(self, dataset: DatasetName, url: str | None) -> Weights:
        if found := self._official(dataset):
            return found
        if url and (self._may_open(url) or self._target(url).path.exists()):
            return self.at_url(url)
        repositories = hub.REPOSITORIES.get((self._variant.name, dataset), ())
        for look in (hub.find, hub.find_in_hf_cache):
            for repository in repositories:
                if path := look(self._cache_dir, repository, self._options):
                    return Weights(path, str(repository))
        if forbidden := self._forbidden():
            raise _Forbidden(self._how_to_bring(dataset, f"{forbidden} forbids fetching them"))
        if not repositories:
            raise ConfigError(
                f"{self._variant.name} ({dataset}) is not on Hugging Face, so `auto` cannot fetch it: ask Meta for "
                f"access at {META_REQUESTS} and set weights_url (DINOV3_WEIGHTS_URL) to the URL in their e-mail"
            )
        gated, ungated = repositories
        anonymous = False
        if token():
            try:
                return Weights(hub.fetch(self._cache_dir, gated, self._options), str(gated))
            except (AccessRefused, ConfigError) as error:
                anonymous = isinstance(error, TokenRefused)
                log.warning("%s. Using %s instead, timm's conversion of the same weights", error, ungated)
        else:
            log.info("no Hugging Face token is set (HF_TOKEN), so using %s instead of %s", ungated, gated)
        return Weights(hub.fetch(self._cache_dir, ungated, self._options, anonymous=anonymous), str(ungated))

    def in_repository(self, repository: Repository) -> Weights:
        for (name, dataset), known in hub.REPOSITORIES.items():
            if repository.name in [each.name for each in known]:
                self._refuse_another(str(repository), name, dataset)
        path = hub.find(self._cache_dir, repository, self._options)
        path = path or hub.find_in_hf_cache(self._cache_dir, repository, self._options)
        if path is None:
            if forbidden := self._forbidden():
                revision = f"--revision {shlex.quote(repository.revision)}"
                raise Unreachable(
                    f"{repository} is not in {self._folder}, and {forbidden} forbids fetching it. Ways to get it:\n"
                    f"{self._by_copy()}\n"
                    f"  - on a machine with a network: hf download {repository.name} {revision} --local-dir FOLDER\n"
                    "    then copy FOLDER here and set weights to its path"
                )
            path = hub.fetch(self._cache_dir, repository, self._options)
        return Weights(path, str(repository))

    def at_url(self, url: str) -> Weights:
        target = self._target(url)
        if target.dataset and (found := self._official(target.dataset)):
            return found
        shown = without_secrets(url)
        hash_source: HashSource = "registry" if target.dataset else "nothing"
        if not target.path.exists():
            if not self._may_open(url):
                why = "`offline` forbids fetching them"
                raise _Forbidden(self._how_to_bring(target.dataset, why, target.path))
            with locked(target.path.with_name(target.path.name + ".lock"), f"fetching {target.path.name}"):
                if not target.path.exists():
                    expected = Expected(sha256=target.digits)
                    sha256 = download(url, target.path, expected, on_progress=self._options.on_progress)
                    manifest.write(target.path, shown, sha256, hash_source)
                    return Weights(target.path, target.path.name)
        prefixes = (target.digits,) if target.digits else ()
        known = manifest.check(target.path, ExpectedHash(shown, hash_source, prefixes), self._options)
        log.info("%s of %s (%s) is in place", target.path, known.source, known.time)
        return Weights(target.path, target.path.name)

    def _official(self, dataset: DatasetName) -> Weights | None:
        """Return a file in the cache folder with an official name, or an older form of it, and the registry's hash."""
        official, digits = self._variant.official_file(dataset), self._variant.hashes[dataset]
        older = f"{self._variant.name}_pretrain"
        for name in (official, f"{older}_{dataset}.pth", f"{older}.pth"):
            path = self._folder / name
            if path.exists():
                # Under an older name it may be the intact file of another dataset.
                prefixes = (digits,) if name == official else tuple(self._variant.hashes.values())
                known = manifest.check(path, ExpectedHash(hash_source="registry", prefixes=prefixes), self._options)
                if known.sha256.startswith(digits):
                    log.info("%s is in place", path)
                    return Weights(path, official)
        return None

    def _target(self, url: str) -> _Target:
        """Return where the file of `url` is kept. Raises ConfigError for another model's name, or none."""
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        if not _FILE_NAME.fullmatch(name) or name.endswith(_RESERVED):
            raise ConfigError(
                f"{without_secrets(url)} does not end in the name of a file; allowed are letters, digits, spaces and "
                f"._-+=, but not the endings {', '.join(_RESERVED)}"
            )
        digits = None
        if found := _OFFICIAL.fullmatch(name):
            arch, named, digits = found.groups()
            self._refuse_another(name, arch, named)
            dataset = self._check_dataset(named or self._settings.dataset)
            if digits in (None, self._variant.hashes[dataset]):
                place = self._folder / self._variant.official_file(dataset)
                return _Target(place, dataset, self._variant.hashes[dataset])
        # Two mirrors may have different files called `model.safetensors`.
        url_hash = hashlib.sha256(without_secrets(url).encode()).hexdigest()[:12]
        return _Target(self._folder / "urls" / url_hash / name, None, digits)

    def _named_dataset(self, url: str) -> str | None:
        """Return the dataset in the file name of `url`, if that is an official name of this variant."""
        found = _OFFICIAL.fullmatch(unquote(urlsplit(url).path.rpartition("/")[2]))
        return found[2] if found and found[1] == self._variant.name else None

    def _check_dataset(self, name: str | None) -> DatasetName:
        """Return the dataset called `name`; by default the one that every variant has. Raises ConfigError."""
        for dataset in self._variant.hashes:
            if dataset == (name or "lvd1689m"):
                return dataset
        known = " and on ".join(self._variant.hashes)
        raise ConfigError(f"{self._variant.name} was not trained on {name}; it was on {known}")

    def _refuse_another(self, what: str, variant: str, dataset: str | None) -> None:
        """Raise ConfigError unless the settings ask for `variant` trained on `dataset`, which `what` holds."""
        if variant != self._variant.name:
            raise ConfigError(
                f"{what} holds {variant}, and the requested model is {self._variant.name}; nothing was fetched. Set "
                f"model to {variant}, or name another source"
            )
        if dataset and self._settings.dataset not in (None, dataset):
            raise ConfigError(
                f"{what} was trained on {dataset}, and the requested dataset is {self._settings.dataset}; nothing was "
                f"fetched. Set dataset to {dataset}, or name another source"
            )

    def _may_open(self, url: str) -> bool:
        return url.startswith("file://") or not self._settings.offline

    def _forbidden(self) -> str | None:
        """Return the setting or variable that forbids connections to Hugging Face, if one does."""
        return "`offline`" if self._settings.offline else hub.offline_variable()

    def _how_to_bring(self, dataset: DatasetName | None, why: str, target: Path | None = None) -> str:
        """Return the message for missing weights; `why` says why they are not fetched."""
        target = target or self._folder / self._variant.official_file(dataset or "lvd1689m")
        folder, file = shlex.quote(str(target.parent)), shlex.quote(str(target))
        ways = [
            self._by_copy(),
            f"  - the URL in Meta's e-mail ({META_REQUESTS}):\n    mkdir -p {folder} && curl -fL -o {file} 'URL'",
        ]
        if dataset and (known := hub.REPOSITORIES.get((self._variant.name, dataset))):
            ways.append(
                f"  - from Hugging Face, ungated: hf download {known[1].name} --local-dir FOLDER\n"
                "    then copy FOLDER here and set weights (--weights, DINOV3_WEIGHTS) to its path"
            )
        return (
            f"the weights of {self._variant.name} are not there, and {why}. The missing file is\n"
            f"    {target}\n" + "Ways to get it:\n" + "\n".join(ways)
        )

    def _by_copy(self) -> str:
        return (
            f"  - on a machine with a network: {self._command('FOLDER')}\n"
            f"    then copy everything in FOLDER/weights into {shlex.quote(str(self._folder))}"
        )

    def _command(self, cache_dir: str | None = None) -> str:
        """Return the command that fetches these weights into this cache folder or another."""
        settings = self._settings
        words = ["dinov3-server", "weights", "--model", self._variant.name.removeprefix("dinov3_")]
        if settings.weights != "auto":
            words += ["--source", without_secrets(settings.weights)]
        if settings.dataset:
            words += ["--dataset", settings.dataset]
        return " ".join([*map(shlex.quote, words), "--cache-dir", shlex.quote(cache_dir or str(self._cache_dir))])


class _Forbidden(Unreachable):
    """Fetching is forbidden; the message says how to get the weights instead."""


class _Target(NamedTuple):
    """Where a fetched file is kept."""

    path: Path
    dataset: DatasetName | None  # of an official file
    digits: str | None  # the first of its sha256, if they are known
