"""One commit of a repository, checked out in a new folder; and what git's own words say about why it was not."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from dinov3_server.provision.git import GitFailed, GitMissing, run

log = logging.getLogger(__name__)

BACKOFF = (1.0, 2.0, 4.0)  # seconds between attempts


class Reason(Enum):
    """Why a commit was not fetched. UNREACHABLE is what may pass; all else stays as it is."""

    NO_COMMIT = "the repository is there, and the commit is not in it"
    REFUSED = "the server wants credentials, or others"
    NO_REPOSITORY = "there is no such repository, or this is no URL of one"
    UNTRUSTED = "the server's certificate is not trusted"
    UNREACHABLE = "no connection, or one that broke off"
    NO_SPACE = "the disk is full"
    READ_ONLY = "the file system is read-only"
    OTHER = "git's words are not known"


class FetchFailed(Exception):
    """`words` are git's own."""

    def __init__(self, reason: Reason, words: str) -> None:
        super().__init__(words)
        self.reason = reason
        self.words = words


# In this order: the last lines that git says of a lost connection are also said after most other failures.
_WORDS = {
    Reason.NO_SPACE: r"No space left on device|Disk quota exceeded|Out of diskspace|unable to write file",
    Reason.READ_ONLY: r"Read-only file system",
    Reason.NO_COMMIT: r"not our ref|unadvertised object|want [0-9a-f]{40} not valid|dumb http transport",
    Reason.REFUSED: (
        r"could not read (Username|Password)|Authentication failed|error: 40[13]|HTTP code 407|"
        r"Permission denied \(|Host key verification failed|[Aa]ccess denied"
    ),
    Reason.NO_REPOSITORY: (
        r"not found|not appear to be a git repository|not a git repository|is this a git repository|does not exist|"
        r"[Uu]nable to find remote helper|'remote-.*' is not a git command|Protocol .* (not supported|disabled)|"
        r"transport .* not allowed|URL rejected|URL using bad/illegal|[Mm]alformed|[Pp]ort number|[Nn]o path specified|"
        r"unknown port|error: 4(00|04|10)"
    ),
    Reason.UNTRUSTED: r"certificate|CAfile",
    Reason.UNREACHABLE: (
        r"[Cc]ould(n't| not) (resolve|connect)|Failed to connect|Connection (refused|closed|timed out|(was )?reset)|"
        r"timed out|too slow|early EOF|hung up unexpectedly|unexpected disconnect|RPC failed|transfer closed|"
        r"Empty reply|unreachable|No route to host|error: (408|429|5\d\d)|[Tt]emporary failure|SSL|TLS|HTTP/2 stream|"
        r"Name or service not known|index-pack failed"
    ),
}
_LOCAL = re.compile(r"file://|(?!\w[^/]*:)")  # a path has no colon before its first slash: that would be ssh's
# A repository on a disk or volume may belong to anybody: what is taken from it is proven by the commit's id.
_ANYBODYS = "--upload-pack=git -c 'safe.directory=*' upload-pack"


def fetch(url: str, revision: str, folder: Path, sleep: Callable[[float], None]) -> None:
    """Check `revision` of the repository at `url` out in `folder`, which is there and empty.

    What may pass is tried again after `sleep(seconds)`. Raises FetchFailed, GitMissing, and OSError of the folder.
    """
    if "://" in url and re.search(r"\s", url):
        # git would quote it, and where it ends, with what may be secret in it, could not be told.
        raise FetchFailed(Reason.NO_REPOSITORY, "a URL has no spaces in it")
    _run("init", "--quiet", "--template=", folder=folder)  # a template could bring hooks
    # Bytes as they are in the commit, whatever its own .gitattributes ask for: they are what is verified.
    (folder / ".git" / "info").mkdir()
    (folder / ".git" / "info" / "attributes").write_text("* -text -filter -ident -working-tree-encoding\n")
    for seconds in BACKOFF:
        try:
            return _attempt(url, revision, folder)
        except FetchFailed as failed:
            if failed.reason is not Reason.UNREACHABLE:
                raise
            log.warning("Meta's code could not be fetched (%s); trying again in %g s", failed.words, seconds)
            sleep(seconds)
    return _attempt(url, revision, folder)


def _attempt(url: str, revision: str, folder: Path) -> None:
    command = ["fetch", "--no-tags", "--no-write-fetch-head", "--progress"]
    if _LOCAL.match(url):
        command.append(_ANYBODYS)
    try:
        _run(*command, "--depth=1", "--", url, revision, folder=folder, reaching=True)
    except FetchFailed as failed:
        if failed.reason not in (Reason.NO_COMMIT, Reason.OTHER):
            raise
        # Not every server lets one ask for an id that is not the tip of a branch, or for a part of the history.
        everything = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")
        _run(*command, "--", url, *everything, folder=folder, reaching=True)
        try:
            _run("cat-file", "-e", revision + "^{commit}", folder=folder)
        except FetchFailed:
            raise FetchFailed(Reason.NO_COMMIT, failed.words) from None
    _run("checkout", "--quiet", "--detach", revision, folder=folder)


def _run(*arguments: str, folder: Path, reaching: bool = False) -> None:
    try:
        run(*arguments, folder=folder, reaching=reaching)
    except GitMissing:
        raise
    except GitFailed as failure:
        words = str(failure)
        reason = next((reason for reason, known in _WORDS.items() if re.search(known, words)), Reason.OTHER)
        raise FetchFailed(reason, words) from None
