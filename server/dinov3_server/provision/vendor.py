"""Fetch Meta's own code with git into a folder, and verify it at every start.

A folder is never half done: a commit is fetched into `.NAME.XXXXXXXX.part` beside it, verified there, and renamed. A
checkout to be replaced is renamed to `.NAME.old` first and removed last; the next process repairs what a killed one
left. All of it happens under the lock `NAME.lock`; a good checkout needs neither lock nor network.
"""

from __future__ import annotations

import errno
import logging
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from dinov3_server.config.types import without_secrets
from dinov3_server.errors import AccessRefused, StartupError, StorageError, Unreachable, UpstreamCodeError
from dinov3_server.provision.checkout import BACKOFF, Found, State, fetch, is_nothing, look
from dinov3_server.provision.git import GitFailed, GitMissing, Reason
from dinov3_server.storage import locked, storage_errors

log = logging.getLogger(__name__)


def vendor(
    upstream_repo: str,
    revision: str,
    target: Path,
    *,
    force: bool = False,
    offline: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Make `target` hold the commit `revision` (40 hex digits) of Meta's repository, complete and unmodified.

    A good checkout stays as it is. One of another commit is replaced, unless it is on a branch, a submodule or a
    worktree: that may be someone's work. `force` fetches again in any case, also over modified code. `offline` fetches
    nothing. `sleep` waits between attempts.

    Raises UpstreamCodeError (`target` holds something that must not be replaced, or the repository is not the right
    one), Unreachable, AccessRefused or StorageError.
    """
    target = target.resolve()
    try:
        fetched = _Vendoring(upstream_repo, revision, target, force, offline, sleep).run()
    except GitMissing:
        raise UpstreamCodeError(
            f"git is not installed, and Meta's code (in {target}) is fetched and checked with it: "
            "`apt-get install git`; or serve without the parity check, which needs it: --parity-check false "
            "(DINOV3_PARITY_CHECK=false)"
        ) from None
    if fetched:
        log.info(
            "Meta's code is in %s. Using it is accepting the DINOv3 License, %s; it may be redistributed only under "
            "that license, with a copy of it",
            target,
            target / "LICENSE.md",
        )


@dataclass
class _Vendoring:
    """The work on one target."""

    _url: str
    _revision: str
    _target: Path
    _force: bool
    _offline: bool
    _sleep: Callable[[float], None]

    def __post_init__(self) -> None:
        self._shown = without_secrets(self._url)
        self._old = self._target.with_name(f".{self._target.name}.old")

    def run(self) -> bool:
        """Return whether anything was fetched."""
        with suppress(OSError):  # files may disappear while another process replaces the checkout
            if self._is_good(look(self._target, self._revision)) and not self._leftovers():
                return False
        with ExitStack() as lock:
            try:
                lock.enter_context(
                    locked(self._target.with_name(self._target.name + ".lock"), f"Meta's code in {self._target}")
                )
            except StorageError:
                if self._is_in_place():  # on a read-only disk; else its own error says more than the lock's
                    return False
                raise
            with storage_errors(self._target):
                self._recover()
                if self._is_in_place():  # another process may have just fetched it
                    return False
                self._fetch()
        return True

    def _is_good(self, found: Found) -> bool:
        return found.state is State.GOOD and not self._force

    def _is_in_place(self) -> bool:
        """Tell whether the target is good; raise if it must not be replaced, or nothing may be fetched."""
        with storage_errors(self._target):
            found = look(self._target, self._revision)
        if self._is_good(found):
            return True
        self._refuse(found)
        return False

    def _leftovers(self) -> list[Path]:
        """List what processes left beside the target: killed ones, or others at work now."""
        unfinished = re.compile(re.escape(f".{self._target.name}.") + r"([0-9a-f]{8}\.part|old)")
        return [path for path in self._target.parent.iterdir() if unfinished.fullmatch(path.name)]

    def _recover(self) -> None:
        """Repair what a killed process left."""
        if self._old.exists() and is_nothing(self._target):
            self._old.rename(self._target)
        for path in self._leftovers():
            if path == self._old:  # renamed first, so that a part of it is never taken for the whole
                path = path.rename(self._unfinished())
            shutil.rmtree(path, ignore_errors=True)  # a git process that outlived its parent may still write there

    def _refuse(self, found: Found) -> None:
        """Raise if what was found must be left alone, or nothing may be fetched."""
        target = shlex.quote(str(self._target))
        # With the repository: where a mirror is used, Meta's own is mostly out of reach.
        source = f"--upstream-repo {shlex.quote(self._shown)} --upstream-revision {self._revision}"
        again = f"`dinov3-server vendor --force {source} --upstream-dir {target}`"
        if found.state is State.FOREIGN:
            raise UpstreamCodeError(
                f"{self._target} {found.detail}. It is left alone: choose another folder for Meta's code with "
                f"--upstream-dir (DINOV3_UPSTREAM_DIR), or remove this one: `rm -r {target}`"
            )
        if found.state is State.MODIFIED and not self._force:
            raise UpstreamCodeError(
                f"{self._target} {found.detail}. Meta's code is used unmodified only. To fetch it again: {again}, or "
                f"remove the folder before the next start: `rm -r {target}`"
            )
        if found.state in (State.ON_BRANCH, State.LINKED) and not self._force:
            raise UpstreamCodeError(
                f"{self._target} {found.detail}; needed is {self._revision}. It may be someone's work, so it is not "
                f"replaced: `git -C {target} checkout --detach {self._revision}`, or {again}"
            )
        if self._offline:
            there = "is not there" if found.state is State.NOTHING else found.detail or "is to be fetched again"
            raise Unreachable(
                f"{self._target} {there}; needed is commit {self._revision} of Meta's code, and --offline "
                f"(DINOV3_OFFLINE) forbids fetching it. {self._by_hand()}"
            )

    def _fetch(self) -> None:
        """Fetch into a folder beside the target, verify, and rename."""
        if self._target.is_mount():
            raise StorageError(
                f"{self._target} is a mount point, which cannot be replaced: choose a folder in it, for example "
                f"--upstream-dir {self._target / 'dinov3'} (DINOV3_UPSTREAM_DIR)"
            )
        log.info("fetching Meta's code, commit %s of %s", self._revision, self._shown)
        staging = self._unfinished()
        try:
            staging.mkdir()
            try:
                fetch(self._url, self._revision, staging, self._sleep)
            except GitFailed as failed:
                raise self._error(failed) from None
            found = look(staging, self._revision)
            if found.state is not State.GOOD:
                raise UpstreamCodeError(
                    f"{self._shown}: the fetched commit {found.detail}; it is not used. Check "
                    "--upstream-repo (DINOV3_UPSTREAM_REPO) and --upstream-revision (DINOV3_UPSTREAM_REVISION)"
                )
            if self._target.exists():
                self._target.rename(self._old)
            staging.rename(self._target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            self._recover()

    def _error(self, failed: GitFailed) -> StartupError | OSError:
        url = self._shown
        check = f"Check --upstream-repo (DINOV3_UPSTREAM_REPO) with `git ls-remote {shlex.quote(url)}`"
        match failed.reason:
            case Reason.NO_SPACE:
                return OSError(errno.ENOSPC, str(failed), str(self._target.parent))
            case Reason.READ_ONLY:
                return OSError(errno.EROFS, str(failed), str(self._target.parent))
            case Reason.NO_COMMIT:
                return UpstreamCodeError(
                    f"{url} has no commit {self._revision} ({failed}). Check --upstream-revision "
                    "(DINOV3_UPSTREAM_REVISION), and that --upstream-repo (DINOV3_UPSTREAM_REPO) is Meta's repository "
                    "or an up-to-date mirror"
                )
            case Reason.REFUSED:
                return AccessRefused(
                    f"{url} refuses access: {failed}. It is private, or does not exist (GitHub asks for a password "
                    f"then, too). {check}; for a private one, see `git help credentials`: git must find them without "
                    "a prompt"
                )
            case Reason.NO_REPOSITORY:
                return UpstreamCodeError(f"{url} is no git repository: {failed}. {check}")
            case Reason.UNTRUSTED:
                return Unreachable(
                    f"{url} is not trusted: {failed}. If a company's proxy re-signs TLS connections, name the file of "
                    "its certificate: `export GIT_SSL_CAINFO=/path/of/ca.pem`"
                )
            case Reason.UNREACHABLE:
                return Unreachable(
                    f"{url} cannot be reached, in {len(BACKOFF) + 1} attempts: {failed}. Set a proxy with `export "
                    "HTTPS_PROXY=http://HOST:PORT`, or a mirror with --upstream-repo (DINOV3_UPSTREAM_REPO). "
                    f"{self._by_hand()}"
                )
        return UpstreamCodeError(f"git could not fetch {self._revision} from {url}: {failed}. {check}")

    def _by_hand(self) -> str:
        return (
            "To bring it by hand, on a machine with a network:\n"
            f"  git clone {shlex.quote(self._shown)} dinov3\n"
            f"  git -C dinov3 checkout --detach {self._revision}\n"
            "and copy that folder here, with the .git in it:\n"
            f"  rsync -a dinov3/ {shlex.quote(f'HOST:{self._target}/')}"
        )

    def _unfinished(self) -> Path:
        return self._target.with_name(f".{self._target.name}.{secrets.token_hex(4)}.part")
