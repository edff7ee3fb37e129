"""Run git so that only its arguments decide what it does: it never prompts, never hangs, and never outlives us."""

from __future__ import annotations

import os
import re
import select
import subprocess
from contextlib import ExitStack
from enum import Enum
from pathlib import Path

from dinov3_server.config.types import without_secrets
from dinov3_server.signals import group_killed, held

# git fetch is killed after so long without output. It prints progress once a second; silence is a connection that is
# not established (libcurl's limit below does not cover it), a silent server behind ssh, or a dead network disk.
SILENT_SECONDS = 60.0

# Inherited variables: all but git's own, and of those the ones that say how a repository is reached. Others could point
# git elsewhere (GIT_DIR) or add output (GIT_TRACE).
_INHERITED = re.compile(r"(?!GIT_).*|GIT_(EXEC_PATH|SSH|SSH_COMMAND|SSH_VARIANT|SSL_\w+|PROXY_\w+|HTTP_\w+)", re.DOTALL)
_CONFIG_FILES = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")
_FIXED = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "",  # empty: overrides any program that the configuration names
    "SSH_ASKPASS_REQUIRE": "never",
    "GCM_INTERACTIVE": "never",
    "GIT_DEFAULT_HASH": "sha1",
    "GIT_DEFAULT_REF_FORMAT": "files",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C",  # `Reason` matches English messages
}
_OVERRIDES = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "gc.auto=0",  # this and maintenance.auto would leave a process behind
    "maintenance.auto=false",
    "advice.detachedHead=false",
    "fetch.recurseSubmodules=false",
    "fetch.writeCommitGraph=false",
    "http.lowSpeedLimit=1000",  # bytes/s: git gives up a slower HTTP transfer ...
    "http.lowSpeedTime=30",  # ... after so many seconds
)
# Lines that do not explain a failure: progress, hints, and what git adds to most failures of a connection.
_NOISE = re.compile(
    r"(remote: )?[A-Z][a-z]+ (objects|deltas|files|references): |(remote: )?Total \d|(hint|warning):|From |"
    r"The most similar command|fatal: Could not read from remote repository|Please make sure you have the correct|"
    r"and the repository exists"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
_LONGEST_MESSAGE = 400  # characters


class Reason(Enum):
    """Why git failed: the patterns of its messages. The first match counts, since git prints the messages of a lost
    connection after most other failures too."""

    NO_SPACE = r"No space left on device|Disk quota exceeded|Out of diskspace|unable to write file"
    READ_ONLY = r"Read-only file system"
    NO_COMMIT = r"not our ref|unadvertised object|want [0-9a-f]{40} not valid|dumb http transport"
    REFUSED = (
        r"could not read (Username|Password)|Authentication failed|error: 40[13]|HTTP code 407|"
        r"Permission denied \(|Host key verification failed|[Aa]ccess denied"
    )
    NO_REPOSITORY = (
        r"not found|not appear to be a git repository|not a git repository|is this a git repository|does not exist|"
        r"[Uu]nable to find remote helper|'remote-.*' is not a git command|Protocol .* (not supported|disabled)|"
        r"transport .* not allowed|URL rejected|URL using bad/illegal|[Mm]alformed|[Pp]ort number|[Nn]o path specified|"
        r"unknown port|error: 4(00|04|10)"
    )
    UNTRUSTED = r"certificate|CAfile"
    UNREACHABLE = (  # may be temporary
        r"[Cc]ould(n't| not) (resolve|connect)|Failed to connect|Connection (refused|closed|timed out|(was )?reset)|"
        r"timed out|too slow|early EOF|hung up unexpectedly|unexpected disconnect|RPC failed|transfer closed|"
        r"Empty reply|unreachable|No route to host|error: (408|429|5\d\d)|[Tt]emporary failure|SSL|TLS|HTTP/2 stream|"
        r"Name or service not known|index-pack failed"
    )
    OTHER = r""


class GitFailed(Exception):
    """git ended with an error. The text is git's own message, shortened and without secrets."""

    def __init__(self, message: str, reason: Reason | None = None) -> None:
        super().__init__(message)
        self.reason = reason or next(reason for reason in Reason if re.search(reason.value, message))


class GitMissing(Exception):
    """git is not installed."""


def run_locally(*arguments: str, folder: Path) -> bytes:
    """Run a command on the repository in `folder`, which any user may own, and return its standard output.

    Only the repository's own configuration applies. Raises GitFailed.
    """
    own = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    with _start(arguments, folder, own, stderr=subprocess.PIPE) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _failed(errors, arguments[0], process.returncode)
    return output


def run_remotely(*arguments: str, folder: Path) -> None:
    """Run a command that connects the repository in `folder` to another one.

    The user's configuration says how that is reached (proxy, certificates, credentials). Raises GitFailed.
    """
    user = {name: os.environ[name] for name in _CONFIG_FILES if name in os.environ}
    if not os.environ.get("GIT_SSH"):
        user["GIT_SSH_COMMAND"] = os.environ.get("GIT_SSH_COMMAND") or "ssh -oBatchMode=yes"
    with ExitStack() as ended:
        with held():  # a signal between the start of git and `group_killed` would leave git running
            # A session of its own: it can be killed with its children, and has no terminal to prompt on.
            process = ended.enter_context(
                _start(arguments, folder, user, stderr=subprocess.STDOUT, start_new_session=True)
            )
            ended.enter_context(group_killed(process))
        output = _read(process)
        status = process.wait()
    if status:
        raise _failed(output, arguments[0], status)


def _start(
    arguments: tuple[str, ...], folder: Path, environment: dict[str, str], stderr: int, start_new_session: bool = False
) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if _INHERITED.fullmatch(name)}
    # With the repository named, git neither searches for it nor checks who owns it.
    repository = {"GIT_DIR": str(folder / ".git"), "GIT_WORK_TREE": str(folder)}
    try:
        return subprocess.Popen(
            ["git", *(word for override in _OVERRIDES for word in ("-c", override)), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=start_new_session,
            env=inherited | environment | _FIXED | repository,
        )
    except (FileNotFoundError, PermissionError):
        raise GitMissing from None


def _read(process: subprocess.Popen[bytes]) -> bytes:
    """Return the end of the output, once git has ended. Raises GitFailed if it falls silent."""
    assert process.stdout is not None
    output = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], SILENT_SECONDS)
        if not ready:
            raise GitFailed(f"Operation timed out: no output from git for {SILENT_SECONDS:g} s")
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            return output
        output = (output + piece)[-(1 << 16) :]


def _failed(output: bytes, command: str, status: int) -> GitFailed:
    lines = [line.strip() for line in re.split(r"[\r\n]+", output.decode(errors="replace"))]
    message = "; ".join([line for line in lines if line and not _NOISE.match(line)][-4:]).rstrip(". ")
    message = _URL.sub(lambda found: without_secrets(found[0]), message)
    if not message:
        return GitFailed(f"git {command} ended with status {status} and no message", Reason.OTHER)
    return GitFailed(message if len(message) <= _LONGEST_MESSAGE else "..." + message[-_LONGEST_MESSAGE:])
