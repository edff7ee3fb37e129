"""Both commands with a closed, full or unread standard output or error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {
    "server": "from dinov3_server.__main__ import main; sys.exit(main())",
    "client": "from dinov3_serving.client_command import main; sys.exit(main())",
}


def start(program: str, *arguments: str, flags: tuple[str, ...] = (), **streams: int) -> subprocess.Popen[str]:
    code = f"import sys; {COMMANDS[program]}"
    return subprocess.Popen([sys.executable, *flags, "-c", code, *arguments], text=True, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("flags", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(("program", "arguments"), [("server", ["models"]), ("client", ["extract", "--help"])])
def test_a_reader_that_is_gone_ends_the_command_quietly(
    program: str, arguments: list[str], flags: tuple[str, ...]
) -> None:
    """As in `dinov3-server models | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start(program, *arguments, flags=flags, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, error = process.communicate()
    assert (process.returncode, error) == (141, "")


@pytest.mark.parametrize(("program", "arguments"), [("server", ["config"]), ("client", ["--help"])])
def test_a_full_disk_is_an_error_in_one_line(program: str, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(program, *arguments, stdout=full.fileno(), stderr=subprocess.PIPE)
        _, error = process.communicate()
    assert process.returncode == 1
    assert error == f"dinov3-{program}: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
@pytest.mark.parametrize(("program", "arguments", "status"), [("server", "models", 0), ("client", "info --target", 2)])
def test_closed_streams(program: str, arguments: str, status: int, closed: str) -> None:
    code = f"import sys; {COMMANDS[program]}"
    redirections = " ".join(f"{descriptor}>&-" for descriptor in closed.split())
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {arguments} {redirections}', sys.executable, code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert "Traceback" not in done.stdout + done.stderr
