"""Meta's own code, fetched by git and verified at every start, in a folder of its own.

A folder is never seen half done: a commit is fetched into `.NAME.XXXXXXXX.part` beside it, verified there, and renamed.
Where another checkout is in the way, that is renamed to `.NAME.old` first and removed last; a process that was killed
in between is put right by the next. All of it happens under the lock `NAME.lock`; a checkout that is good needs
neither lock nor network.
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
from pathlib import Path

from dinov3_server.config.types import without_secrets
from dinov3_server.errors import AccessRefused, StartupError, StorageError, Unreachable, UpstreamCodeError
from dinov3_server.provision.checkout import Found, State, is_nothing, look
from dinov3_server.provision.git import GitMissing
from dinov3_server.provision.git_fetch import BACKOFF, FetchFailed, Reason, fetch
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
    """Have the commit `revision` (40 hex digits) of Meta's repository in `target`, whole and unmodified.

    A good checkout is left alone, another commit's is replaced, unless somebody works in it. `force` fetches anew
    whatever Meta's code in `target` is like. `offline` fetches nothing. `sleep` waits between attempts.

    Raises UpstreamCodeError (`target` holds what must not be replaced, or the repository is not what is wanted),
    Unreachable, AccessRefused or StorageError.
    """
    target = target.resolve()
    try:
        fetched = _have(_Vendoring(upstream_repo, revision, target), force, offline, sleep)
    except GitMissing:
        raise UpstreamCodeError(
            f"git is not installed, and Meta's code (in {target}) is fetched and checked with it: "
            "`apt-get install git`; or serve without the proof that it is for: --parity-check false "
            "(DINOV3_PARITY_CHECK=false)"
        ) from None
    if fetched:
        log.info(
            "Meta's code is in %s. Using it is accepting the DINOv3 License, %s; it may be redistributed only under "
            "that license, with a copy of it",
            target,
            target / "LICENSE.md",
        )


def _have(vendoring: _Vendoring, force: bool, offline: bool, sleep: Callable[[float], None]) -> bool:
    """Whether anything had to be fetched."""
    target, revision = vendoring.target, vendoring.revision
    with suppress(OSError):  # also of files that go while another process puts a new checkout in place
        if not force and look(target, revision).state is State.GOOD and not vendoring.leftovers():
            return False
    with ExitStack() as held:
        try:
            held.enter_context(locked(target.with_name(target.name + ".lock"), f"Meta's code in {target}"))
        except StorageError:
            with storage_errors(target):
                found = look(target, revision)
            if found.state is State.GOOD and not force:
                return False
            vendoring.refuse(found, force, offline)  # what is wrong with it says more
            raise
        with storage_errors(target):
            vendoring.recover()
            found = look(target, revision)  # another process may just have put it there
            if found.state is State.GOOD and not force:
                return False
            vendoring.refuse(found, force, offline)
            vendoring.fetch(sleep)
    return True


class _Vendoring:
    """What is done to one target, by whoever holds its lock."""

    def __init__(self, url: str, revision: str, target: Path) -> None:
        self._url = url
        self.revision = revision
        self.target = target
        self._old = target.with_name(f".{target.name}.old")

    def leftovers(self) -> list[Path]:
        """What processes left beside the target that were killed, or are at work now."""
        unfinished = re.compile(re.escape(f".{self.target.name}.") + r"([0-9a-f]{8}\.part|old)")
        return [path for path in self.target.parent.iterdir() if unfinished.fullmatch(path.name)]

    def recover(self) -> None:
        """Put right what a process left that was killed."""
        if self._old.exists() and is_nothing(self.target):
            self._old.rename(self.target)
        for path in self.leftovers():
            if path == self._old:  # renamed first, so that no part of it is ever taken for the whole
                path = path.rename(self._unfinished())
            shutil.rmtree(path, ignore_errors=True)  # a git that outlived its starter may still write there

    def refuse(self, found: Found, force: bool, offline: bool) -> None:
        """Raise where what was found must be left alone, or nothing may be fetched."""
        target = shlex.quote(str(self.target))
        # With its repository: where there is a mirror, Meta's own is mostly out of reach.
        source = f"--upstream-repo {shlex.quote(without_secrets(self._url))} --upstream-revision {self.revision}"
        again = f"`dinov3-server vendor --force {source} --upstream-dir {target}`"
        if found.state is State.FOREIGN:
            raise UpstreamCodeError(
                f"{self.target} {found.detail}. It is left alone: name another folder for Meta's code with "
                f"--upstream-dir (DINOV3_UPSTREAM_DIR), or remove this one: `rm -r {target}`"
            )
        if found.state is State.MODIFIED and not force:
            raise UpstreamCodeError(
                f"{self.target} {found.detail}. Meta's code is used unmodified only. {again} fetches it anew; so does "
                f"the next start once the folder is gone: `rm -r {target}`"
            )
        if found.state is State.ON_BRANCH and not force:
            raise UpstreamCodeError(
                f"{self.target} {found.detail}, and {self.revision} is wanted. On a branch it may be somebody's "
                f"work, so it is not replaced: `git -C {target} checkout --detach {self.revision}`, or {again}"
            )
        if offline:
            there = "is not there" if found.state is State.NOTHING else found.detail or "is to be fetched anew"
            raise Unreachable(
                f"{self.target} {there}; wanted is commit {self.revision} of Meta's code, and --offline "
                f"(DINOV3_OFFLINE) forbids fetching it. {self._by_hand()}"
            )

    def fetch(self, sleep: Callable[[float], None]) -> None:
        """Fetch, verify, put in place."""
        if self.target.is_mount():
            raise StorageError(
                f"{self.target} is a mount point, so that nothing can be renamed to it: name a folder in it, as "
                f"--upstream-dir {self.target / 'dinov3'} (DINOV3_UPSTREAM_DIR)"
            )
        log.info("fetching Meta's code, commit %s of %s", self.revision, without_secrets(self._url))
        staging = self._unfinished()
        try:
            staging.mkdir()
            try:
                fetch(self._url, self.revision, staging, sleep)
            except FetchFailed as failed:
                raise self._error(failed) from None
            found = look(staging, self.revision)
            if found.state is not State.GOOD:
                raise UpstreamCodeError(
                    f"{without_secrets(self._url)}: what was fetched {found.detail}; it is not used. Check "
                    "--upstream-repo (DINOV3_UPSTREAM_REPO) and --upstream-revision (DINOV3_UPSTREAM_REVISION)"
                )
            if self.target.exists():
                self.target.rename(self._old)
            staging.rename(self.target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            self.recover()

    def _error(self, failed: FetchFailed) -> StartupError | OSError:
        url, words = without_secrets(self._url), failed.words
        check = f"Check --upstream-repo (DINOV3_UPSTREAM_REPO) with `git ls-remote {shlex.quote(url)}`"
        match failed.reason:
            case Reason.NO_SPACE:
                return OSError(errno.ENOSPC, words, str(self.target.parent))
            case Reason.READ_ONLY:
                return OSError(errno.EROFS, words, str(self.target.parent))
            case Reason.NO_COMMIT:
                return UpstreamCodeError(
                    f"{url} has no commit {self.revision} ({words}). Check --upstream-revision "
                    "(DINOV3_UPSTREAM_REVISION), and that --upstream-repo (DINOV3_UPSTREAM_REPO) is "
                    " Meta's repository or a mirror that is up to date"
                )
            case Reason.REFUSED:
                return AccessRefused(
                    f"{url} refuses access: {words}. It is private, or not there (GitHub asks for a password then, "
                    f"too). {check}; for a private one, see `git help credentials`: git must find them without asking"
                )
            case Reason.NO_REPOSITORY:
                return UpstreamCodeError(f"{url} is no git repository: {words}. {check}")
            case Reason.UNTRUSTED:
                return Unreachable(
                    f"{url} is not trusted: {words}. Where a company's proxy signs what passes, name the file of its "
                    "certificate: `export GIT_SSL_CAINFO=/path/of/ca.pem`"
                )
            case Reason.UNREACHABLE:
                return Unreachable(
                    f"{url} cannot be reached, in {len(BACKOFF) + 1} attempts: {words}. A proxy is named by "
                    f"`export HTTPS_PROXY=http://HOST:PORT`, a mirror by --upstream-repo (DINOV3_UPSTREAM_REPO). "
                    f"{self._by_hand()}"
                )
            case Reason.OTHER:
                return UpstreamCodeError(f"git could not fetch {self.revision} from {url}: {words}. {check}")

    def _by_hand(self) -> str:
        return (
            "To bring it by hand, on a machine with a network:\n"
            f"  git clone {shlex.quote(without_secrets(self._url))} dinov3\n"
            f"  git -C dinov3 checkout --detach {self.revision}\n"
            "and copy that folder here, with the .git in it:\n"
            f"  rsync -a dinov3/ {shlex.quote(f'HOST:{self.target}/')}"
        )

    def _unfinished(self) -> Path:
        return self.target.with_name(f".{self.target.name}.{secrets.token_hex(4)}.part")
