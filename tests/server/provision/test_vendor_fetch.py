"""Fetching Meta's code from failing servers: the message of each failure, and retries."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dinov3_server.errors import AccessRefused, StartupError, StorageError, Unreachable, UpstreamCodeError
from dinov3_server.provision import git as git_module
from dinov3_server.provision.checkout import State, look
from dinov3_server.provision.vendor import vendor
from tests.server.provision.repositories import add_commit, beside, git, make_repository, program
from tests.support.git_server import STALL, GitServer, git_server
from tests.support.waiting import LIMIT, until


class Rig:
    """A repository with two commits behind HTTP, and a record of the waits between attempts."""

    def __init__(self, folder: Path, server: GitServer) -> None:
        self.repository = server.root / "dinov3.git"
        self.first = make_repository(self.repository)
        self.second = add_commit(self.repository, {"dinov3/new.py": ""})
        self.server = server
        self.url = server.url("dinov3.git")
        self.target = folder / "upstream" / "code"
        self.waits: list[float] = []

    def vendor(self, url: str | None = None, revision: str | None = None) -> None:
        vendor(url or self.url, revision or self.first, self.target, sleep=self.waits.append)

    def fails(self, url: str | None = None, revision: str | None = None) -> StartupError:
        """Return the error, after checking that nothing is left behind."""
        with pytest.raises(StartupError) as raised:
            self.vendor(url, revision)
        assert beside(self.target) == ["code.lock"]
        assert "secret" not in str(raised.value)
        assert len(str(raised.value)) < 1500
        return raised.value


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with git_server(tmp_path / "served") as server:
        yield Rig(tmp_path, server)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder at the front of PATH."""
    folder = tmp_path / "programs"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_commit_is_fetched_by_its_id_over_http(rig: Rig) -> None:
    rig.vendor()
    assert look(rig.target, rig.first).state is State.GOOD
    assert git(rig.target, "rev-list", "--count", "HEAD") == "1"
    assert rig.waits == []


@pytest.mark.parametrize("dumb", [False, True])
def test_a_server_that_refuses_ids_is_fetched_completely(rig: Rig, dumb: bool) -> None:
    rig.server.modern, rig.server.dumb = False, dumb
    git(rig.repository, "update-server-info")
    url = rig.url + "/.git" if dumb else rig.url
    add_commit(rig.repository, {"dinov3/newer.py": ""})
    git(rig.repository, "update-server-info")
    rig.vendor(url)
    assert look(rig.target, rig.first).state is State.GOOD
    assert git(rig.target, "rev-list", "--count", "--all") == "3"


def test_a_commit_on_a_tag_only_is_found(rig: Rig) -> None:
    rig.server.modern = False
    git(rig.repository, "tag", "released", rig.second)
    git(rig.repository, "reset", "--quiet", "--hard", rig.first)
    add_commit(rig.repository, {"other.txt": ""})
    rig.vendor(revision=rig.second)
    assert look(rig.target, rig.second).state is State.GOOD


@pytest.mark.parametrize("modern", [False, True])
def test_an_unknown_commit(rig: Rig, modern: bool) -> None:
    rig.server.modern = modern
    error = rig.fails(revision="0123456789" * 4)
    assert isinstance(error, UpstreamCodeError)
    assert "has no commit " + "0123456789" * 4 in str(error)
    assert "--upstream-revision" in str(error)
    assert rig.waits == []


def test_an_unknown_commit_of_a_local_repository(rig: Rig) -> None:
    assert "has no commit" in str(rig.fails(str(rig.repository), "0123456789" * 4))
    assert "has no commit" in str(rig.fails(rig.repository.as_uri(), "0123456789" * 4))


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_needs_credentials_is_not_retried(rig: Rig, status: int) -> None:
    rig.server.answers = [status] * 9
    error = rig.fails()
    assert isinstance(error, AccessRefused)
    assert "git help credentials" in str(error)
    assert rig.waits == []


def test_credentials_in_the_url_are_used_and_never_shown(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    url = rig.url.replace("//", "//user:secret@") + "?token=secret"
    for answers in ([401] * 9, [500] * 9, [404] * 9, [200] * 9):
        rig.server.answers = answers
        rig.fails(url)
    rig.server.answers = []
    rig.vendor(rig.url.replace("//", "//user:secret@"))
    assert "secret" not in caplog.text
    assert rig.url in caplog.text
    kept = [path for path in rig.target.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    assert not kept


@pytest.mark.parametrize("status", [404, 410, 200])
def test_a_url_without_a_repository(rig: Rig, status: int) -> None:
    rig.server.answers = [status] * 9
    error = rig.fails()
    assert isinstance(error, UpstreamCodeError)
    assert "is no git repository" in str(error)
    assert f"git ls-remote {rig.url}" in str(error)
    assert rig.waits == []


@pytest.mark.parametrize(
    "url",
    ["/nonexistent", "file:///nonexistent", "foo://host/x", "http://[bad/x", "http://h:99999/x", " ", "-x", "--all",
     "https://u:secret@ h/x?sign=secret"],
)  # fmt: skip
def test_malformed_repository_urls(rig: Rig, url: str) -> None:
    assert type(rig.fails(url)) is UpstreamCodeError
    assert rig.waits == []


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_temporary_failures_are_retried(rig: Rig, status: int, caplog: pytest.LogCaptureFixture) -> None:
    rig.server.answers = [status] * 3
    rig.vendor()
    assert look(rig.target, rig.first).state is State.GOOD
    assert rig.waits == [1, 2, 4]
    assert len([line for line in caplog.messages if "trying again" in line]) == 3


def test_fetching_fails_after_four_attempts(rig: Rig) -> None:
    rig.server.answers = [500] * 9
    error = rig.fails()
    assert isinstance(error, Unreachable)
    assert "500" in str(error)
    assert f"git clone {rig.url} dinov3" in str(error)
    assert rig.waits == [1, 2, 4]
    assert len(rig.server.paths) == 4


def test_a_refused_connection(rig: Rig) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        error = rig.fails(f"http://127.0.0.1:{unheard.getsockname()[1]}/dinov3.git")
    assert isinstance(error, Unreachable)
    assert "HTTPS_PROXY" in str(error)
    assert rig.waits == [1, 2, 4]


def test_a_silent_server_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_module, "SILENT_SECONDS", 0.2)
    rig.server.answers = [STALL] * 4
    error = rig.fails()
    assert isinstance(error, Unreachable)
    assert "no output from git" in str(error)
    assert rig.waits == [1, 2, 4]


def test_git_gets_a_minimum_speed_and_the_c_locale(
    rig: Rig, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    real = git(tmp_path, "--exec-path") + "/git"
    program(programs, "git", f'echo "$@ in $LC_ALL" >> {tmp_path}/calls; exec {real} "$@"')
    rig.vendor()
    (fetched,) = [line for line in (tmp_path / "calls").read_text().splitlines() if " fetch " in line]
    assert "-c http.lowSpeedLimit=1000 -c http.lowSpeedTime=30 " in fetched
    assert fetched.endswith(" in C")


WORDS = {
    "fatal: unable to access 'https://u:secret@h/': Could not resolve host: h": (Unreachable, "Could not resolve"),
    "fatal: unable to access 'https://h/': Operation too slow. Less than 1000 bytes/sec": (Unreachable, "too slow"),
    "fatal: unable to access 'https://h/': Failed to connect to h port 443: Connection timed out": (Unreachable, ""),
    "error: RPC failed; curl 56 Recv failure: Connection reset by peer\nfatal: early EOF": (Unreachable, "early EOF"),
    "fatal: unable to access 'https://h/': gnutls_handshake() failed: TLS was cut": (Unreachable, "HTTPS_PROXY"),
    "fatal: unable to access 'https://h/': server certificate verification failed. CAfile: none": (
        Unreachable, "GIT_SSL_CAINFO"),
    "git@h: Permission denied (publickey).\nfatal: Could not read from remote repository": (AccessRefused, "publickey"),
    "Host key verification failed.\nfatal: Could not read from remote repository.": (AccessRefused, "Host key"),
    "fatal: Authentication failed for 'https://u:secret@h/'": (AccessRefused, "'https://h/'"),
    "fatal: unable to access 'https://h/': Received HTTP code 407 from proxy after CONNECT": (AccessRefused, "407"),
    "remote: Repository not found.\nfatal: repository 'https://h/' not found": (UpstreamCodeError, "no git repository"),
    "fatal: write error: No space left on device\nfatal: early EOF": (StorageError, "the disk is full"),
    "fatal: sha1 file 'x' write error. Out of diskspace": (StorageError, "the disk is full"),
    "error: unable to write file dinov3/hub/utils.py": (StorageError, "the disk is full"),
    "fatal: cannot mkdir x: Disk quota exceeded": (StorageError, "the disk is full"),
    "fatal: could not open x: Read-only file system": (StorageError, "read-only"),
    "fatal: a word that nobody knows": (UpstreamCodeError, "a word that nobody knows"),
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_git_messages_are_classified_and_quoted(rig: Rig, programs: Path, tmp_path: Path, words: str) -> None:
    kind, said = WORDS[words]
    real = git(tmp_path, "--exec-path") + "/git"
    (tmp_path / "words").write_text(f"Receiving objects: 50% (1/2)\r{words}\n")
    program(programs, "git", f'case "$*" in *" fetch "*) cat {tmp_path}/words >&2; exit 128;; esac; exec {real} "$@"')
    error = rig.fails("https://user:secret@h/?sign=secret")
    assert type(error) is kind
    assert said in str(error)
    assert "Receiving" not in str(error)
    assert rig.waits == ([1, 2, 4] if kind is Unreachable and "GIT_SSL_CAINFO" not in str(error) else [])


@pytest.mark.parametrize("there", [False, True])
def test_without_git_the_error_says_what_to_do(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:  # then it cannot be checked
        rig.vendor()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(UpstreamCodeError) as error:
        rig.vendor()
    assert "apt-get install git" in str(error.value)
    assert "--parity-check false" in str(error.value)


def test_ssh_does_not_prompt(rig: Rig, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_SSH_COMMAND", raising=False)
    monkeypatch.delenv("GIT_SSH", raising=False)
    asks = f"if (: < /dev/tty) 2> /dev/null; then echo terminal; fi >> {tmp_path}/calls"
    program(
        programs, "ssh", f'echo "$@" >> {tmp_path}/calls; {asks}; echo "Permission denied (publickey)." >&2; exit 255'
    )
    assert isinstance(rig.fails("git@host.invalid:dinov3.git"), AccessRefused)
    called = (tmp_path / "calls").read_text()
    assert "-oBatchMode=yes" in called
    assert "terminal" not in called


def test_no_program_prompts_for_a_password(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = program(tmp_path / "asking", "ask", f"touch {tmp_path}/asked; echo secret")
    for name in ("GIT_ASKPASS", "SSH_ASKPASS"):
        monkeypatch.setenv(name, str(asks))
    (tmp_path / "config").write_text(f"[core]\naskPass = {asks}\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    rig.server.answers = [401] * 9
    assert isinstance(rig.fails(), AccessRefused)
    assert not (tmp_path / "asked").exists()


def test_the_users_configuration_says_how_a_repository_is_reached(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(f'[url "{rig.url}"]\ninsteadOf = https://github.com/facebookresearch/dinov3.git\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    rig.vendor("https://github.com/facebookresearch/dinov3.git")
    assert look(rig.target, rig.first).state is State.GOOD


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_git_is_killed_with_its_children(rig: Rig, programs: Path, tmp_path: Path, sent: signal.Signals) -> None:
    """On Ctrl-C they are killed at once; after SIGKILL of our process, by SIGPIPE at their next output."""
    pids = tmp_path / "pids"
    works = "while echo working; do sleep 0.05; done" if sent == signal.SIGKILL else "exec sleep 60"
    real = git(tmp_path, "--exec-path") + "/git"
    hangs = f"echo $$ >> {pids}; ({works}) & echo $! >> {pids}; wait"
    program(programs, "git", f'case "$*" in *" fetch "*) {hangs};; esac; exec {real} "$@"')
    code = "import sys, pathlib, signal; from dinov3_server.provision.vendor import vendor; "
    # A shell starts what it puts in the background (`make test &`) deaf to SIGINT, and children inherit that.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "vendor(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))"
    command = [sys.executable, "-c", code, rig.url, rig.first, str(rig.target)]
    ours = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2, "git runs")
    ours.send_signal(sent)
    assert ours.wait(LIMIT) == -sent
    _, child = pids.read_text().split()
    until(lambda: not running(child), "git's child ends")
    if sent == signal.SIGINT:
        assert beside(rig.target) == ["code.lock"]


def test_a_signal_during_the_start_of_git_kills_it(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal arrives after git's first output and before Popen returns."""
    program(programs, "git", "sleep 60 & echo $!; wait")
    started = []

    def start(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = real(*args, **options)
        assert process.stdout is not None
        started.append(process.stdout.readline().decode().strip())
        signal.raise_signal(signal.SIGINT)
        return process

    real = subprocess.Popen
    monkeypatch.setattr(git_module.subprocess, "Popen", start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            git_module.run_remotely("fetch", folder=programs)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    [child] = started
    until(lambda: not running(child), "git's child ends")


def running(pid: str) -> bool:
    try:
        state = re.sub(r".*\) ", "", Path(f"/proc/{pid}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False
    return not state.startswith("Z")


def can_mount() -> bool:
    try:
        return (
            subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "t", "/mnt"], capture_output=True).returncode == 0
        )
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="this machine lets nobody mount a small disk")
@pytest.mark.parametrize(("options", "said"), [("size=64k", "disk is full"), ("ro", "read-only")])
def test_on_a_real_disk(rig: Rig, tmp_path: Path, options: str, said: str) -> None:
    add_commit(rig.repository, {"large.txt": "".join(f"{number}\n" for number in range(100000))})
    large = git(rig.repository, "rev-parse", "HEAD")
    disk = tmp_path / "disk"
    disk.mkdir()
    code = "import sys, pathlib; from dinov3_server.provision.vendor import vendor; "
    code += "vendor(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))"
    script = f'mount -t tmpfs -o {options} t {disk} && "$@"; ls -A {disk}/upstream'
    command = [sys.executable, "-c", code, str(rig.repository), large, str(disk / "upstream" / "code")]
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *command], capture_output=True, text=True)
    last = next(line for line in reversed(done.stderr.splitlines()) if "StorageError" in line)
    assert said in last
    assert done.stdout.split() in ([], ["code.lock"])
