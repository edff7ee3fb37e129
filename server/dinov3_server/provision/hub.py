"""Weights from Hugging Face: which repositories hold them, what lies in a repository, and fetching it.

`huggingface_hub` speaks to the hub's API, finds the token and knows the endpoint; the bytes go through `download`, like
all others. Under `home/weights/OWNER--REPO/` there is a folder for each commit, and in `refs/` a file for each branch
or tag that was asked for, which holds the commit that it was then. So a repository is resolved once: later starts open
no connection, and do not even import the library.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar
from urllib.parse import quote

from dinov3_server.config.kinds import without_secrets
from dinov3_server.errors import AccessRefused, CheckpointError, ConfigError, StartupError, Unreachable
from dinov3_server.models.variant import DatasetName
from dinov3_server.provision import manifest
from dinov3_server.provision.download import Expected, download
from dinov3_server.provision.manifest import Authority, Care, Promise
from dinov3_server.storage import check_space, locked, storage_errors, write_whole

log = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_TRUE = ("1", "ON", "YES", "TRUE")  # as the library reads its environment
_COMMIT = re.compile("[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_ANSWER_SECONDS = 30.0
_PAUSES = (1.0, 3.0)  # seconds before the second and the third try of what can pass

T = TypeVar("T")


@dataclass(frozen=True)
class Repository:
    """A model repository at a branch, tag or commit. `str()` is its URL, hf://OWNER/REPO[@REVISION]."""

    name: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hf://{self.name}" + (f"@{self.revision}" if self.revision != "main" else "")


class TokenRefused(AccessRefused):
    """The hub does not know the token. Without one it may answer."""


def _official_pair(arch: str, timm: str, dataset: DatasetName = "lvd1689m") -> tuple[Repository, Repository]:
    gated = f"facebook/dinov3-{arch.replace('_', '-')}-pretrain-{dataset}"
    return Repository(gated), Repository(f"timm/{timm}{'_' if arch.startswith('convnext') else '.'}{dataset}")


# Of each variant and dataset: Meta's own repository, which wants a token and Meta's consent, and timm's conversion of
# the same weights, which is open. dinov3_vitl16plus is on neither.
REPOSITORIES: Mapping[tuple[str, DatasetName], tuple[Repository, Repository]] = MappingProxyType(
    {
        ("dinov3_vits16", "lvd1689m"): _official_pair("vits16", "vit_small_patch16_dinov3"),
        ("dinov3_vits16plus", "lvd1689m"): _official_pair("vits16plus", "vit_small_plus_patch16_dinov3"),
        ("dinov3_vitb16", "lvd1689m"): _official_pair("vitb16", "vit_base_patch16_dinov3"),
        ("dinov3_vitl16", "lvd1689m"): _official_pair("vitl16", "vit_large_patch16_dinov3"),
        ("dinov3_vitl16", "sat493m"): _official_pair("vitl16", "vit_large_patch16_dinov3", "sat493m"),
        ("dinov3_vith16plus", "lvd1689m"): _official_pair("vith16plus", "vit_huge_plus_patch16_dinov3"),
        ("dinov3_vit7b16", "lvd1689m"): _official_pair("vit7b16", "vit_7b_patch16_dinov3"),
        ("dinov3_vit7b16", "sat493m"): _official_pair("vit7b16", "vit_7b_patch16_dinov3", "sat493m"),
        ("dinov3_convnext_tiny", "lvd1689m"): _official_pair("convnext_tiny", "convnext_tiny.dinov3"),
        ("dinov3_convnext_small", "lvd1689m"): _official_pair("convnext_small", "convnext_small.dinov3"),
        ("dinov3_convnext_base", "lvd1689m"): _official_pair("convnext_base", "convnext_base.dinov3"),
        ("dinov3_convnext_large", "lvd1689m"): _official_pair("convnext_large", "convnext_large.dinov3"),
    }
)


def parse(url: str) -> Repository:
    """The repository that hf://OWNER/REPO[@REVISION] names. Raises ConfigError."""
    name, at, revision = url.removeprefix("hf://").partition("@")
    parts = name.split("/")
    good = len(parts) == 2 and all(_NAME.fullmatch(part) and ".." not in part and "--" not in part for part in parts)
    if not good or (at and (not _REVISION.fullmatch(revision) or ".." in revision)):
        raise ConfigError(
            f"weights is {without_secrets(url)!r}, which names no repository; allowed: hf://OWNER/REPO or "
            "hf://OWNER/REPO@REVISION, as hf://timm/vit_base_patch16_dinov3.lvd1689m@main"
        )
    return Repository(name, revision or "main")


def disabled() -> str | None:
    """The environment variable that forbids the hub, as the library reads it; None where none does."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in _TRUE:
            return variable
    return None


def find(home: Path, repository: Repository, care: Care) -> Path | None:
    """Where the repository's weights lie, fetched before and checked now: a file, or a folder of shards and index.

    None where something of it is missing, or lies there without a manifest. Opens no connection. Raises CheckpointError
    for a file that has changed.
    """
    folder = _folder(home, repository)
    commit = repository.revision
    if not _COMMIT.fullmatch(commit):
        ref = _ref(folder, repository)
        with storage_errors(ref):
            if not ref.exists():
                return None
            commit = ref.read_text("ascii", "replace").strip()
        if not _COMMIT.fullmatch(commit):
            return None
    place = folder / commit
    if _checked(place / SINGLE, care):
        names, found = [SINGLE], place / SINGLE
    elif _checked(place / INDEX, care):
        names, found = [INDEX, *shards(place / INDEX)], place
    else:
        return None
    if not all(_checked(place / name, care) for name in names[1:]):
        return None
    log.info("%s: commit %s, fetched before, is in %s", repository, commit, place)
    return found


def fetch(home: Path, repository: Repository, care: Care, *, anonymous: bool = False) -> Path:
    """As `find`, after fetching what is missing. `anonymous` sends no token.

    Raises AccessRefused (TokenRefused where it is for the token alone), ConfigError for a repository, revision or file
    that is not there, Unreachable, CheckpointError and StorageError.
    """
    folder = _folder(home, repository)
    with locked(folder.with_name(folder.name + ".lock"), f"fetching {repository}"):
        if found := find(home, repository, care):  # Another process has fetched it in the meantime.
            return found
        hub = _Hub(repository, anonymous)
        commit, files = hub.listing()
        log.info("%s is commit %s at %s; its weights are fetched into %s", repository, commit, hub.where, folder)
        place = folder / commit
        with storage_errors(place):
            place.mkdir(parents=True, exist_ok=True)
        if SINGLE in files:
            names, found = [SINGLE], place / SINGLE
        elif INDEX in files:
            hub.obtain(INDEX, place, commit, files, care)
            names, found = shards(place / INDEX), place
            if absent := [name for name in names if name not in files]:
                raise CheckpointError(f"{repository}: its {INDEX} names {absent[0]!r}, which is not in the repository")
        else:
            held = ", ".join(sorted(files)[:8]) or "nothing"
            raise ConfigError(f"{repository} has neither {SINGLE} nor {INDEX}; it holds {held}")
        missing = [name for name in names if not (place / name).exists()]
        check_space(place, sum(_remaining(place / name, files[name]) for name in missing), str(repository))
        for name in names:
            hub.obtain(name, place, commit, files, care)
        if commit != repository.revision:
            write_whole(_ref(folder, repository), commit.encode() + b"\n")
    return found


def shards(index: Path) -> list[str]:
    """The files that an index names. Raises CheckpointError where it is none, or names one outside its folder."""
    try:
        with storage_errors(index):
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        if not names:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is no index of shards: a JSON object with a weight_map is wanted") from None
    for name in names:
        if not isinstance(name, str) or not _SHARD.fullmatch(name) or ".." in name:
            raise CheckpointError(f"{index} names the file {name!r}; only .safetensors files beside it are read")
    return sorted(names)


class _Hub:
    """One repository of the hub, as the library reaches it with the environment of now.

    The library reads HF_ENDPOINT only when it is imported, so it is given the endpoint with each call.
    """

    def __init__(self, repository: Repository, anonymous: bool) -> None:
        from huggingface_hub import constants

        self._repository = repository
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._token = None if anonymous else token()
        self._may_read = False

    def listing(self) -> tuple[str, dict[str, Expected]]:
        """The commit that the revision is now, and what is known of each file in it."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint, token=self._token or False)
        info = self._ask(
            lambda: api.model_info(
                self._repository.name,
                revision=self._repository.revision,
                files_metadata=True,
                timeout=_ANSWER_SECONDS,
            )
        )
        if not _COMMIT.fullmatch(info.sha or ""):
            raise Unreachable(f"{self.where} gave no commit for {self._repository}: it does not speak the hub's API")
        files = {
            each.rfilename: Expected(each.size, each.lfs.sha256 if each.lfs else None) for each in info.siblings or ()
        }
        return str(info.sha), files

    def obtain(self, name: str, place: Path, commit: str, files: Mapping[str, Expected], care: Care) -> None:
        """`name` in the folder `place`, with a manifest: checked if it is there, else fetched."""
        target, expected = place / name, files[name]
        source = f"hf://{self._repository.name}@{commit}/{name}"
        authority: Authority = "hub" if expected.sha256 else "nothing"
        if target.exists():
            digits = (expected.sha256,) if expected.sha256 else ()
            manifest.check(target, Promise(source, authority, digits), care)
            return
        url = f"{self._endpoint}/{self._repository.name}/resolve/{commit}/{quote(name)}"
        if not self._may_read:
            self._ask_for_access(url)
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        got = download(url, target, expected, headers=headers, report=care.report)
        manifest.write(target, source, got.sha256, authority)

    def _ask_for_access(self, url: str) -> None:
        """The API shows gated repositories to anybody; only their files are refused, and the library says best why."""
        from huggingface_hub import get_hf_file_metadata

        self._ask(
            lambda: get_hf_file_metadata(
                url, token=self._token or False, timeout=_ANSWER_SECONDS, endpoint=self._endpoint
            )
        )
        self._may_read = True

    def _ask(self, call: Callable[[], T]) -> T:
        """What `call` of the library returns, tried again where that may help. Raises as `fetch`."""
        for pause in _PAUSES:
            try:
                with self._explained():
                    return call()
            except _Passing as error:
                log.warning("%s; trying again in %g s", error, pause)
                time.sleep(pause)
        with self._explained():
            return call()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the library raises into our errors: what is wrong, where to look, what to do."""
        import httpx2
        from huggingface_hub import errors

        name, page = self._repository.name, f"{self.where}/{self._repository.name}"
        try:
            yield
        except errors.GatedRepoError as error:
            have = "the token that was sent has no access to it" if self._token else "no token was sent"
            raise AccessRefused(
                f"{name} on Hugging Face is gated, and {have}: ask for access at {page}, make a token that may read "
                f"gated repositories at {self.where}/settings/tokens, then set HF_TOKEN or run `hf auth login`"
                f"{self._said(error)}"
            ) from None
        except errors.DisabledRepoError:
            raise AccessRefused(f"{name} was disabled by Hugging Face; see {page}") from None
        except errors.RevisionNotFoundError:
            raise ConfigError(
                f"{name} has no revision {self._repository.revision!r}; see {page}/tree/main for its branches and "
                f"tags, or leave @{self._repository.revision} out for main"
            ) from None
        except errors.RemoteEntryNotFoundError as error:
            raise ConfigError(
                f"{name} does not have the file {error.response.url.path}; see {page}/tree/main"
            ) from None
        except errors.RepositoryNotFoundError:
            raise self._no_repository() from None
        except errors.HfHubHTTPError as error:
            raise self._of_status(error.response.status_code, self._said(error)) from None
        except errors.OfflineModeIsEnabled:
            raise Unreachable(f"{self._repository}: HF_HUB_OFFLINE forbids the connection") from None
        except errors.HFValidationError as error:
            raise ConfigError(f"{self._repository} names no repository: {' '.join(str(error).split())}") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise _Passing(
                f"{self.where} cannot be reached for {self._repository}: {why}; check the network and its proxy "
                "(HTTPS_PROXY), or name a mirror in HF_ENDPOINT"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError):  # It is the library that stumbles over the answer.
            raise Unreachable(
                f"{self.where} answered for {self._repository}, but not as the hub does (a login page of the "
                "network, or a wrong HF_ENDPOINT)"
            ) from None

    def _no_repository(self) -> ConfigError:
        """The hub does not tell a private repository from none."""
        have = "this token may not see it" if self._token else "no token was sent (HF_TOKEN, `hf auth login`)"
        name, where = self._repository.name, self.where
        return ConfigError(
            f"there is no repository {name} at {where}, or it is private and {have}: check the name at {where}/{name}"
        )

    def _of_status(self, status: int, said: str) -> StartupError:
        where = self.where
        match status:
            case 401 if not self._token:
                return self._no_repository()
            case 404:  # of a mirror, which does not give the hub's codes
                return self._no_repository()
            case 401:
                return TokenRefused(
                    f"{where} does not know the token that was sent for {self._repository}: make one at "
                    f"{where}/settings/tokens and set HF_TOKEN or run `hf auth login`, or remove it with "
                    f"`hf auth logout` or by unsetting HF_TOKEN{said}"
                )
            case 403:
                return AccessRefused(
                    f"{where} forbids {self._repository} to the token that was sent: see what it may read at "
                    f"{where}/settings/tokens{said}"
                )
            case 429:
                return Unreachable(
                    f"{where} has had too many requests from here (429 for {self._repository}): try again in five "
                    f"minutes, with a token (HF_TOKEN), which may ask more often{said}"
                )
            case _ if status >= 500:
                return _Passing(
                    f"{where} failed at {self._repository} (status {status}); see https://status.huggingface.co{said}"
                )
        return Unreachable(f"{where} refused {self._repository} (status {status}){said}")

    def _said(self, error: Exception) -> str:
        """The server's own words, on one line, without the token."""
        words = " ".join(str(getattr(error, "server_message", None) or "").split())
        if self._token:
            words = words.replace(self._token, "...")
        return f' (it said: "{words[:300]}")' if words else ""

    @property
    def where(self) -> str:
        """The hub's address as it may be shown."""
        return without_secrets(self._endpoint)


class _Passing(Unreachable):
    """A failure that may be over in a moment."""


def token() -> str | None:
    """The token that requests bring: of the environment, or where `hf auth login` has put it; None where none is."""
    from huggingface_hub import constants, get_token

    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def _checked(file: Path, care: Care) -> bool:
    """Whether the file is there with a manifest; if so, it is as it should be."""
    if not file.exists() or manifest.read(file) is None:
        return False
    manifest.check(file, Promise(), care)
    return True


def _folder(home: Path, repository: Repository) -> Path:
    return home / "weights" / repository.name.replace("/", "--")


def _ref(folder: Path, repository: Repository) -> Path:
    return folder / "refs" / quote(repository.revision, safe="")


def _remaining(target: Path, expected: Expected) -> int:
    part = target.with_name(target.name + ".part")
    return max((expected.size or 0) - (part.stat().st_size if part.exists() else 0), 0)
