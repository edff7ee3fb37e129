"""Ask the Hugging Face hub's API through `huggingface_hub`, and turn its errors into ours.

The library makes the API requests, finds the token and knows the endpoint. Files are fetched by `download`, which
resumes after SIGKILL and hashes as it goes. The library's own download does neither: 2.4.0 starts again from the first
byte, 0.34.0 gives up when a connection breaks off, and both accept wrong bytes of the right size.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit

from dinov3_server.config.types import without_secrets
from dinov3_server.errors import AccessRefused, ConfigError, StartupError, Unreachable
from dinov3_server.provision.download import Expected, download
from dinov3_server.provision.http import DOWNLOAD_TIMEOUT, ETAG_TIMEOUT, timeout

log = logging.getLogger(__name__)

COMMIT = re.compile("[0-9a-f]{40}")
RETRY_PAUSES = (1.0, 3.0)  # seconds

T = TypeVar("T")


@dataclass(frozen=True)
class Repository:
    """A model repository at a branch, tag or commit. `str()` gives its URL, hf://OWNER/REPO[@REVISION]."""

    name: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hf://{self.name}" + (f"@{self.revision}" if self.revision != "main" else "")


class TokenRefused(AccessRefused):
    """The hub does not accept the token; a request without one may succeed."""


class HubApi:
    """One repository of the hub. The environment is read at construction.

    The library reads HF_ENDPOINT only when it is imported, so the endpoint is passed with each call.
    """

    def __init__(self, repository: Repository, anonymous: bool) -> None:
        from huggingface_hub import constants

        self._repository = repository
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._token = None if anonymous else token()
        self._timeout = timeout(ETAG_TIMEOUT)
        self._has_access = False
        self.shown = without_secrets(self._endpoint)

    def listing(self) -> tuple[str, dict[str, Expected]]:
        """Return the commit of the revision, and the size and sha256 (of large files) of each of its files."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint, token=self._token or False)
        info = self._ask(
            lambda: api.model_info(
                self._repository.name,
                revision=self._repository.revision,
                files_metadata=True,
                timeout=self._timeout,
            )
        )
        if not COMMIT.fullmatch(info.sha or ""):
            raise Unreachable(f"{self.shown} gave no commit for {self._repository}: it does not speak the hub's API")
        files = {
            each.rfilename: Expected(each.size, each.lfs.sha256 if each.lfs else None) for each in info.siblings or ()
        }
        return str(info.sha), files

    def download(
        self, name: str, commit: str, target: Path, expected: Expected, on_progress: Callable[[str], None] | None
    ) -> str:
        """Download the file `name` to `target` and return its sha256."""
        from huggingface_hub import get_hf_file_metadata

        url = f"{self._endpoint}/{self._repository.name}/resolve/{commit}/{quote(name)}"
        if not self._has_access:  # the API lists gated repositories to everyone, and refuses only their files
            token = self._token or False
            self._ask(lambda: get_hf_file_metadata(url, token=token, timeout=self._timeout, endpoint=self._endpoint))
            self._has_access = True
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return download(url, target, expected, headers=headers, on_progress=on_progress)

    def _ask(self, call: Callable[[], T]) -> T:
        """Make a call of the library, and repeat it after a failure that may be temporary."""
        for pause in (*RETRY_PAUSES, None):
            try:
                return call()
            except Exception as error:
                ours = self._explain(error)
            if pause is None or not isinstance(ours, _Temporary):
                raise ours
            log.warning("%s; trying again in %g s", ours, pause)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _explain(self, error: Exception) -> StartupError:
        """Turn an exception of the library into ours: what is wrong, where to look, what to do."""
        from huggingface_hub import errors

        name, page = self._repository.name, f"{self.shown}/{self._repository.name}"
        match error:
            case errors.GatedRepoError():
                have = "the token that was sent has no access to it" if self._token else "no token was sent"
                return AccessRefused(
                    f"{name} on Hugging Face is gated, and {have}: ask for access at {page}, make a token that may "
                    f"read gated repositories at {self.shown}/settings/tokens, then set HF_TOKEN or run "
                    f"`hf auth login`{self._said(error)}"
                )
            case errors.DisabledRepoError():
                return AccessRefused(f"{name} was disabled by Hugging Face; see {page}")
            case errors.RevisionNotFoundError():
                return ConfigError(
                    f"{name} has no revision {self._repository.revision!r}; see {page}/tree/main for its branches and "
                    f"tags, or leave @{self._repository.revision} out for main"
                )
            case errors.RepositoryNotFoundError():
                return self._of_status(404, "")
            case errors.HfHubHTTPError() if isinstance(error, errors.EntryNotFoundError):
                path = urlsplit(str(error.response.url)).path
                return ConfigError(f"{name} does not have the file {path}; see {page}/tree/main")
            case errors.HfHubHTTPError():
                return self._of_status(error.response.status_code, self._said(error))
            case errors.OfflineModeIsEnabled():
                return Unreachable(f"{self._repository}: HF_HUB_OFFLINE forbids the connection")
            case errors.HFValidationError():
                return ConfigError(f"{self._repository} does not name a repository: {' '.join(str(error).split())}")
            case ValueError() | TypeError() | KeyError() | AttributeError():  # the library cannot read the answer
                return Unreachable(
                    f"{self.shown} answered for {self._repository}, but not like the hub (a login page of the "
                    "network, or a wrong HF_ENDPOINT)"
                )
        kind = type(error).__name__  # of requests, httpx or httpx2
        why = " ".join(str(error).split()) or kind
        slow = (
            f". If it is a mirror that fetches files itself before it answers, give it more than {self._timeout:g} s: "
            f"{ETAG_TIMEOUT} and {DOWNLOAD_TIMEOUT}, in seconds"
        )
        return _Temporary(
            f"{self.shown} cannot be reached for {self._repository}: {why}; check the network and its proxy "
            f"(HTTPS_PROXY), or set HF_ENDPOINT to a mirror{slow if 'Timeout' in kind else ''}"
        )

    def _of_status(self, status: int, said: str) -> StartupError:
        where, name = self.shown, self._repository.name
        match status:
            case 401 if self._token:
                return TokenRefused(
                    f"{where} does not accept the token that was sent for {self._repository}: make one at "
                    f"{where}/settings/tokens and set HF_TOKEN or run `hf auth login`, or remove it with "
                    f"`hf auth logout` or by unsetting HF_TOKEN{said}"
                )
            case 401 | 404:  # missing or private: the hub does not say which
                have = "this token may not see it" if self._token else "no token was sent (HF_TOKEN, `hf auth login`)"
                return ConfigError(
                    f"there is no repository {name} at {where}, or it is private and {have}: check the name at "
                    f"{where}/{name}"
                )
            case 403:
                return AccessRefused(
                    f"{where} forbids {self._repository} to the token that was sent: see its permissions at "
                    f"{where}/settings/tokens{said}"
                )
            case 429:
                return Unreachable(
                    f"{where} got too many requests from here (429 for {self._repository}): try again in five minutes, "
                    f"with a token (HF_TOKEN), which has a higher limit{said}"
                )
            case _ if status >= 500:
                return _Temporary(
                    f"{where} failed at {self._repository} (status {status}); see https://status.huggingface.co{said}"
                )
        return Unreachable(f"{where} refused {self._repository} (status {status}){said}")

    def _said(self, error: Exception) -> str:
        """Quote the server's own message, on one line, without the token."""
        words = " ".join(str(getattr(error, "server_message", None) or "").split())
        if self._token:
            words = words.replace(self._token, "...")
        return f' (it said: "{words[:300]}")' if words else ""


class _Temporary(Unreachable):
    """A failure that may be temporary."""


def token() -> str | None:
    """Return the token of the environment or of `hf auth login`, if there is one and it may be sent."""
    from huggingface_hub import constants, get_token

    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
