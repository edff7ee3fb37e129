"""Running git so that nothing but its arguments decides what it does: it never asks, never hangs, never outlives us."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from dinov3_server.config.types import without_secrets
from dinov3_server.signals import held

# A transfer of fewer bytes a second than this, for so many seconds, is given up by git itself, over HTTP.
_SLOW_BYTES, _SLOW_SECONDS = 1000, 30
# Without a word from git for so long it is ended. Its progress is a word a second; what says nothing is a connection
# that is not established (libcurl's limit does not cover it), or a silent server behind ssh or a dead network disk.
SILENT_SECONDS = 60.0

# All variables but git's own, and of those the ones that tell how a repository is reached: others could lead git
# elsewhere (GIT_DIR) or have it say more (GIT_TRACE).
_KEPT = re.compile(r"(?!GIT_).*|GIT_(EXEC_PATH|SSH|SSH_COMMAND|SSH_VARIANT|SSL_\w+|PROXY_\w+|HTTP_\w+)", re.DOTALL)
_CONFIG_FILES = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")
_FIXED = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "",  # empty: no program asks either, whatever the configuration names
    "SSH_ASKPASS_REQUIRE": "never",
    "GCM_INTERACTIVE": "never",
    "GIT_DEFAULT_HASH": "sha1",
    "GIT_DEFAULT_REF_FORMAT": "files",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C",  # its words are looked through
}
_OVERRIDES = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "gc.auto=0",  # nor maintenance.auto: both leave a process behind
    "maintenance.auto=false",
    "advice.detachedHead=false",
    "fetch.recurseSubmodules=false",
    "fetch.writeCommitGraph=false",
    f"http.lowSpeedLimit={_SLOW_BYTES}",
    f"http.lowSpeedTime={_SLOW_SECONDS}",
)
# What says nothing about a failure: progress, hints, and what git adds to most failures of a connection.
_IDLE = re.compile(
    r"(remote: )?[A-Z][a-z]+ (objects|deltas|files|references): |(remote: )?Total \d|(hint|warning):|From |"
    r"The most similar command|fatal: Could not read from remote repository|Please make sure you have the correct|"
    r"and the repository exists"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
_LAST_WORDS = 400  # characters


class GitFailed(Exception):
    """git ended with an error; the text is its own last words, short and without secrets."""


class GitMissing(GitFailed):
    """git is not installed."""


def ask(*arguments: str, folder: Path) -> bytes:
    """What a command that only reads the repository in `folder` writes to standard output. Raises GitFailed."""
    try:
        done = subprocess.run(
            ["git", *_overrides(), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=_environment(os.environ, folder, reaching=False),
            check=False,
        )
    except (FileNotFoundError, PermissionError):
        raise GitMissing from None
    if done.returncode:
        raise GitFailed(_last_words(done.stderr, arguments[0], done.returncode))
    return done.stdout


def run(*arguments: str, folder: Path, reaching: bool = False) -> None:
    """Run a command of git on the repository in `folder`, whoever owns it.

    `reaching` is for the command that talks to another repository: how that is reached (proxy, certificates,
    credentials) is the user's configuration to tell. All others see none but the repository's own. Raises GitFailed.
    """
    with ExitStack() as ended:
        with held():  # or Ctrl-C could come when git runs and nothing knows that it is to be ended
            process = ended.enter_context(
                _start([*_overrides(), *arguments], _environment(os.environ, folder, reaching))
            )
            ended.callback(_end, process)
        said = _listen(process, SILENT_SECONDS if reaching else None)
        status = process.wait()
    if status:
        raise GitFailed(_last_words(said, arguments[0], status))


def _start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            ["git", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A group that can be ended whole, without the terminal: neither Ctrl-C nor a question reaches it.
            start_new_session=True,
            env=environment,
        )
    except (FileNotFoundError, PermissionError):
        raise GitMissing from None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill git and all that it has started, unless it has ended."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _overrides() -> list[str]:
    return [part for each in _OVERRIDES for part in ("-c", each)]


def _environment(inherited: Mapping[str, str], folder: Path, reaching: bool) -> dict[str, str]:
    kept = {name: value for name, value in inherited.items() if _KEPT.fullmatch(name)}
    if reaching:
        kept |= {name: inherited[name] for name in _CONFIG_FILES if name in inherited}
        if "GIT_SSH" not in kept:
            kept.setdefault("GIT_SSH_COMMAND", "ssh -oBatchMode=yes")
    else:
        kept |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    # Named, not searched for: so it is this one, and git does not ask to whom it belongs.
    return kept | _FIXED | {"GIT_DIR": str(folder / ".git"), "GIT_WORK_TREE": str(folder)}


def _listen(process: subprocess.Popen[bytes], silent_seconds: float | None) -> bytes:
    """What git says until it ends. Raises GitFailed where it falls silent."""
    assert process.stdout is not None
    said = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], silent_seconds)
        if not ready:
            raise GitFailed(f"Operation timed out: not a word from git for {silent_seconds:g} s")
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            return said
        said = (said + piece)[-(1 << 16) :]


def _last_words(said: bytes, command: str, status: int) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", said.decode(errors="replace"))]
    words = "; ".join([line for line in lines if line and not _IDLE.match(line)][-4:]).rstrip(". ")
    words = _URL.sub(lambda found: without_secrets(found[0]), words)
    if not words:
        return f"git {command} ended with status {status} and said nothing"
    return words if len(words) <= _LAST_WORDS else "..." + words[-_LAST_WORDS:]
