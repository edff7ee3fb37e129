"""Commands, flags and environment variables that the pages name exist.

The commands are parsed, not run. What they do is tested with the code that they call.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov3_client import cli as client_cli
from dinov3_server import cli as server_cli
from dinov3_server.config.load import _OTHER_ENV
from dinov3_server.config.settings import SETTINGS
from tests.support.paths import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.yaml")),
]
IMAGE = "dinov3-serving"  # its entrypoint is dinov3-server
PROGRAMS = ("dinov3-server", "dinov3-client", "make", "python")


def fenced(text: str) -> Iterator[str]:
    """Yield the lines of the fenced blocks, those that end in a backslash joined with the next one."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


def spans(text: str) -> Iterator[str]:
    """Yield the inline code."""
    yield from (span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))


def commands(line: str) -> Iterator[list[str]]:
    """Yield the commands of a line whose programs are ours, from the program on."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # not a shell line
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if word not in ("&&", "||", "|", ";", "&"):
            command.append(word)
            continue
        while command and (command[0] == "$" or re.fullmatch(r"\w+=.*", command[0])):
            del command[0]
        if command[:2] in (["docker", "run"], ["docker", "exec"]) and "--entrypoint" not in command:
            while command and command[0] not in (*PROGRAMS, IMAGE):
                del command[0]
            command[:1] = ["dinov3-server"] if command[:1] == [IMAGE] else command[:1]
        if len(command) > 1 and Path(command[0]).name in PROGRAMS:
            yield [Path(command[0]).name, *(word.removesuffix("...") or "PLACEHOLDER" for word in command[1:])]
        command = []


def check(command: list[str]) -> None:
    """Parse a command as its program does. Raises SystemExit or AssertionError."""
    program, *arguments = command
    if program == "dinov3-server":
        server_cli._parse(arguments)
    elif program == "dinov3-client":
        client_cli._parser().parse_args(arguments)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets
    elif arguments[:2] == ["-m", "grpc_tools.protoc"]:
        assert (ROOT / arguments[-1]).exists()
    elif arguments[:1] == ["-m"]:
        package = ROOT / arguments[1].replace(".", "/")
        assert package.exists() or package.with_suffix(".py").exists()
        names = set(arguments[2:]) - {"--help", "NAME"}  # of benchmarks, of attacks
        assert all((package / f"{name}.py").exists() or (package / name).exists() for name in names)
    else:
        assert (ROOT / arguments[0]).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    text = page.read_text()
    wrong = []
    for line in [*fenced(text), *spans(text)]:
        for command in commands(line):
            try:
                check(command)
            except (AssertionError, SystemExit):
                wrong.append(line)
    assert not wrong


def test_commands_are_found() -> None:
    """The test above sees the examples: a few of each program, through an image and with variables."""
    line = "A=1 make demo && docker run -p 1:1 dinov3-serving serve --model vits16 | dinov3-client info  # b"
    assert list(commands(line)) == [
        ["make", "demo"],
        ["dinov3-server", "serve", "--model", "vits16"],
        ["dinov3-client", "info"],
    ]
    found = [command[0] for page in PAGES for line in fenced(page.read_text()) for command in commands(line)]
    assert set(found) == {"dinov3-server", "dinov3-client", "make", "python"}
    assert len(found) > 25


@pytest.mark.parametrize(
    "line",
    [
        "dinov3-server serve --modle vits16",
        "dinov3-server extract photos/",
        "dinov3-client extract photos/ --output cls",
        "docker run dinov3-serving serve --modle vits16",
        "make tests",
        "python -m bench nonsense",
    ],
)
def test_wrong_commands_are_noticed(line: str) -> None:
    (command,) = commands(line)
    with pytest.raises((AssertionError, SystemExit)):
        check(command)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "Dockerfile", ROOT / "Makefile"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_environment_variables_exist(page: Path) -> None:
    known = {f"DINOV3_{setting.name.upper()}" for setting in SETTINGS} | _OTHER_ENV
    named = set(re.findall(r"\bDINOV3_[A-Z][A-Z_]*[A-Z]\b", page.read_text()))
    assert named <= known | {"DINOV3_SERVICE_HOST", "DINOV3_SOME_NAME"}
