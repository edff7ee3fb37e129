"""Where the weights of a model come from: found in place, or fetched and checked."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from dinov3_server.config.kinds import without_secrets
from dinov3_server.config.settings import Settings
from dinov3_server.errors import AccessRefused, ConfigError, StorageError, Unreachable
from dinov3_server.models.variant import DatasetName, Variant
from dinov3_server.provision import hub, manifest
from dinov3_server.provision.download import Expected, download
from dinov3_server.provision.http import META_ASKS
from dinov3_server.provision.manifest import Care, Promise
from dinov3_server.storage import locked, storage_errors

log = logging.getLogger(__name__)

# Meta's names, and those of older documents, which lack the hash or the dataset too.
_OFFICIAL = re.compile(r"(dinov3_\w+?)_pretrain(?:_(lvd1689m|sat493m))?(?:-([0-9a-f]{8}))?\.pth")
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+= -]{0,199}")
_OURS = (manifest.SUFFIX, ".part", ".lock")


class Weights(NamedTuple):
    """`path` is a file, or a folder of shards with its index; `label` is what people call these weights."""

    path: Path
    label: str


def find_or_fetch(settings: Settings, variant: Variant, *, report: Callable[[str], None] | None = None) -> Weights:
    """The weights of `variant` from where `settings.weights` says, which is not random:SEED.

    What is fetched is checked and kept under home, so that it is fetched once. `report` is told how far downloads and
    checks are. Raises ConfigError, Unreachable, AccessRefused, CheckpointError and StorageError.
    """
    search = _Search(settings, variant, report)
    given = settings.weights
    with storage_errors(settings.cache_folder / "weights"):
        if given == "auto":
            return search.auto()
        if given.startswith("hf://"):
            return search.of_repository(hub.parse(given))
        if given.startswith(("https://", "http://", "file://")):
            return search.of_url(given)
    if "://" in given:
        raise ConfigError(
            f"weights is {without_secrets(given)!r}; URLs may begin with https://, http://, file:// or hf://"
        )
    return _in_place(given)


def _in_place(given: str) -> Weights:
    """A person's own file or folder, used where it lies; the loader checks what is in it."""
    shown = without_secrets(given)
    try:
        path = Path(given).expanduser()
        if path.exists():
            # wget calls a file from a signed URL as the URL ends, with what signs it.
            return Weights(path, without_secrets(path.absolute().name))
    except OSError as error:
        raise StorageError(f"weights is {shown!r}: {error.strerror} (this process is uid {os.getuid()})") from None
    path = Path(shown).expanduser()
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        raise ConfigError(f"weights is {shown!r}, and there is no folder {path.parent} that can be read") from None
    near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
    what = f"did you mean {' or '.join(near)}?" if near else f"it holds {', '.join(beside[:8]) or 'nothing'}"
    raise ConfigError(f"weights is {shown!r}, and there is no {path.name!r} in {path.parent.absolute()}; {what}")


class _Search:
    """The search for one variant's weights, as the settings have it."""

    def __init__(self, settings: Settings, variant: Variant, report: Callable[[str], None] | None) -> None:
        self._settings = settings
        self._variant = variant
        self._dataset(settings.dataset)
        self._home = settings.cache_folder
        self._folder = self._home / "weights"
        self._care = Care(self._command(), full=settings.verify_weights == "full", report=report)

    def auto(self) -> Weights:
        """In this order: home under an official name; `weights_url`; Hugging Face, from home or from the hub."""
        settings, url = self._settings, self._settings.weights_url
        dataset = self._dataset(settings.dataset or (url and self._named_dataset(url)))
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
            return self.of_url(url)
        repositories = hub.REPOSITORIES.get((self._variant.name, dataset), ())
        for repository in repositories:
            if path := hub.find(self._home, repository, self._care):
                return Weights(path, str(repository))
        if forbidden := self._forbidden():
            raise _Forbidden(self._how_to_bring(dataset, f"{forbidden} forbids fetching them"))
        if not repositories:
            raise ConfigError(
                f"{self._variant.name} ({dataset}) is not on Hugging Face, so `auto` cannot fetch it: ask Meta for "
                f"access at {META_ASKS} and set weights_url (DINOV3_WEIGHTS_URL) to the URL that they send"
            )
        gated, ungated = repositories
        anonymous = False
        if hub.token():
            try:
                return Weights(hub.fetch(self._home, gated, self._care), str(gated))
            except (AccessRefused, ConfigError) as error:
                anonymous = isinstance(error, hub.TokenRefused)
                log.warning("%s. For now %s is taken, timm's conversion of the same weights", error, ungated)
        else:
            log.info("no token of Hugging Face is set (HF_TOKEN), so %s is taken and not %s", ungated, gated)
        return Weights(hub.fetch(self._home, ungated, self._care, anonymous=anonymous), str(ungated))

    def of_repository(self, repository: hub.Repository) -> Weights:
        for (name, dataset), known in hub.REPOSITORIES.items():
            if repository.name in [each.name for each in known]:
                self._refuse_another(str(repository), name, dataset)
        path = hub.find(self._home, repository, self._care)
        if path is None:
            if forbidden := self._forbidden():
                revision = f"--revision {shlex.quote(repository.revision)}"
                raise Unreachable(
                    f"{repository} is not in {self._folder}, and {forbidden} forbids fetching it. Bring it by one of\n"
                    f"{self._by_copy()}\n"
                    f"  - on a machine with a network: hf download {repository.name} {revision} --local-dir FOLDER\n"
                    "    then copy FOLDER here and set weights to its path"
                )
            path = hub.fetch(self._home, repository, self._care)
        return Weights(path, str(repository))

    def of_url(self, url: str) -> Weights:
        target = self._target(url)
        if target.dataset and (found := self._official(target.dataset)):
            return found
        shown = without_secrets(url)
        promise = Promise(shown, "registry" if target.dataset else "nothing", target.digits)
        if not target.path.exists():
            if not self._may_open(url):
                why = "`offline` forbids fetching them"
                raise _Forbidden(self._how_to_bring(target.dataset, why, target.path))
            with locked(target.path.with_name(target.path.name + ".lock"), f"fetching {target.path.name}"):
                if not target.path.exists():
                    digits = target.digits[0] if target.digits else None
                    expected = Expected(sha256=digits)
                    offline = self._settings.offline
                    got = download(url, target.path, expected, offline=offline, report=self._care.report)
                    manifest.write(target.path, shown, got.sha256, promise.authority)
                    return Weights(target.path, target.path.name)
        known = manifest.check(target.path, promise, self._care)
        log.info("%s of %s (%s) is in place", target.path, known.source, known.time)
        return Weights(target.path, target.path.name)

    def _official(self, dataset: DatasetName) -> Weights | None:
        """A file under home with an official name, or an older spelling of it, whose hash is the registry's."""
        official = self._variant.official_file(dataset)
        path = self._folder / official
        if path.exists():
            manifest.check(path, Promise(authority="registry", digits=(self._variant.hashes[dataset],)), self._care)
            log.info("%s is in place", path)
            return Weights(path, official)
        for older in (f"{self._variant.name}_pretrain_{dataset}.pth", f"{self._variant.name}_pretrain.pth"):
            path = self._folder / older
            if path.exists():
                # Without a dataset in its name it may be the good file of another.
                promise = Promise(authority="registry", digits=tuple(self._variant.hashes.values()))
                known = manifest.check(path, promise, self._care)
                if known.sha256.startswith(self._variant.hashes[dataset]):
                    log.info("%s is in place", path)
                    return Weights(path, official)
        return None

    def _target(self, url: str) -> _Target:
        """Where the file of `url` is kept. Raises ConfigError for a name that is another's, or no name."""
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        if not _SAFE.fullmatch(name) or name.endswith(_OURS):
            raise ConfigError(
                f"{without_secrets(url)} does not end in the name of a file; allowed are letters, digits, spaces and "
                f"._-+=, and none of the endings {', '.join(_OURS)}"
            )
        digits = None
        if found := _OFFICIAL.fullmatch(name):
            arch, named, digits = found.groups()
            self._refuse_another(name, arch, named)
            dataset = self._dataset(named or self._settings.dataset)
            if digits in (None, self._variant.hashes[dataset]):
                place = self._folder / self._variant.official_file(dataset)
                return _Target(place, dataset, (self._variant.hashes[dataset],))
        # Two mirrors may call different files `model.safetensors`.
        which = hashlib.sha256(without_secrets(url).encode()).hexdigest()[:12]
        return _Target(self._folder / "urls" / which / name, None, (digits,) if digits else ())

    def _named_dataset(self, url: str) -> str | None:
        """The dataset that an official name of this variant at the end of `url` names."""
        found = _OFFICIAL.fullmatch(unquote(urlsplit(url).path.rpartition("/")[2]))
        return found[2] if found and found[1] == self._variant.name else None

    def _dataset(self, name: str | None) -> DatasetName:
        """The dataset called `name`; without a name the one that every variant has."""
        for dataset in self._variant.hashes:
            if dataset == (name or "lvd1689m"):
                return dataset
        known = " and on ".join(self._variant.hashes)
        raise ConfigError(f"{self._variant.name} was not trained on {name}; it was on {known}")

    def _refuse_another(self, what: str, variant: str, dataset: str | None) -> None:
        """That `what`, which is known to hold `variant` trained on `dataset`, is what the settings ask for."""
        if variant != self._variant.name:
            raise ConfigError(
                f"{what} holds {variant}, and the model asked for is {self._variant.name}; nothing was fetched. Set "
                f"model to {variant}, or name another source"
            )
        if dataset and self._settings.dataset not in (None, dataset):
            raise ConfigError(
                f"{what} was trained on {dataset}, and the dataset asked for is {self._settings.dataset}; nothing was "
                f"fetched. Set dataset to {dataset}, or name another source"
            )

    def _may_open(self, url: str) -> bool:
        return url.startswith("file://") or not self._settings.offline

    def _forbidden(self) -> str | None:
        """What forbids to ask Hugging Face, if anything does."""
        return "`offline`" if self._settings.offline else hub.disabled()

    def _how_to_bring(self, dataset: DatasetName | None, why: str, target: Path | None = None) -> str:
        """The message for weights that are not there; `why` says why they are not fetched."""
        target = target or self._folder / self._variant.official_file(dataset or "lvd1689m")
        ways = [self._by_copy(), f"  - the URL that Meta sends ({META_ASKS}):\n    {self._by_curl(target)}"]
        if dataset and (known := hub.REPOSITORIES.get((self._variant.name, dataset))):
            ways.append(
                f"  - from Hugging Face, without a gate: hf download {known[1].name} --local-dir FOLDER\n"
                "    then copy FOLDER here and set weights (--weights, DINOV3_WEIGHTS) to its path"
            )
        return (
            f"the weights of {self._variant.name} are not there, and {why}. Wanted is\n"
            f"    {target}\n" + "Bring it by one of\n" + "\n".join(ways)
        )

    def _by_copy(self) -> str:
        return (
            f"  - on a machine with a network: {self._command('FOLDER')}\n"
            f"    then copy all that is in FOLDER/weights into {shlex.quote(str(self._folder))}"
        )

    def _by_curl(self, target: Path) -> str:
        return f"mkdir -p {shlex.quote(str(target.parent))} && curl -fL -o {shlex.quote(str(target))} 'URL'"

    def _command(self, home: str | None = None) -> str:
        """The command that fetches these weights, into this home or another."""
        settings = self._settings
        words = ["dinov3-server", "weights", "--model", self._variant.name.removeprefix("dinov3_")]
        if settings.weights != "auto":
            words += ["--source", without_secrets(settings.weights)]
        if settings.dataset:
            words += ["--dataset", settings.dataset]
        return " ".join([*map(shlex.quote, words), "--cache-dir", shlex.quote(home or str(self._home))])


class _Forbidden(Unreachable):
    """It tells how to bring what may not be fetched."""


@dataclass(frozen=True)
class _Target:
    """Where a fetched file is kept; its dataset where it is an official file; the digits that its hash begins with."""

    path: Path
    dataset: DatasetName | None
    digits: tuple[str, ...]
