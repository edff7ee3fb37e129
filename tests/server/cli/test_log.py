"""Log lines as they come out of real processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from tests.support.waiting import LIMIT


def stderr_of(level: str, form: str, code: str) -> list[str]:
    """The lines that `code` logs in a process of its own, called `worker-0 50%{`."""
    program = (
        "import logging, warnings\n"
        "from dinov3_server.log import configure\n"
        f"configure({level!r}, {form!r}, 'worker-0 50%{{')\n"
        "log = logging.getLogger('dinov3_server.engine')\n" + code
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=LIMIT, check=True)
    assert done.stdout == b""
    return done.stderr.decode().splitlines()


def test_text() -> None:
    (line,) = stderr_of("info", "text", "log.info('loaded %s in %.1f s', 'vits16', 2)\nlog.debug('not this')")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO     worker-0 50%\{: loaded vits16 in 2\.0 s", line)


def test_json() -> None:
    before = datetime.now(UTC)
    code = (
        "log.warning('two\\nlines \\udc80 é %d', 3)\n"
        "try:\n    1 / 0\n"
        "except ZeroDivisionError:\n    log.exception('failed')\n"
        "log.info('here', stack_info=True)\n"
    )
    warning, error, info = map(json.loads, stderr_of("info", "json", code))
    written = datetime.fromisoformat(warning.pop("ts"))
    assert (written - before).total_seconds() > -0.002  # Milliseconds are cut off.
    assert written <= datetime.now(UTC)
    assert warning == {
        "level": "warning",
        "process": "worker-0 50%{",
        "logger": "dinov3_server.engine",
        "message": "two\nlines \udc80 é 3",  # What is no text, as file names may be, comes through.
    }
    assert (error["level"], error["message"]) == ("error", "failed")
    assert error["exc"].startswith("Traceback (most recent call last)")
    assert error["exc"].endswith("ZeroDivisionError: division by zero")
    assert "Stack (most recent call last)" in info["stack"]
    assert "exc" not in info


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error", "other warning"]),
        ("warning", ["warning", "error", "other warning"]),
        ("error", ["error", "other warning"]),
    ],
)
def test_level_is_ours_and_others_are_heard_from_warning_on(level: str, expected: list[str]) -> None:
    code = (
        "for each in ('debug', 'info', 'warning', 'error'):\n    getattr(log, each)(each)\n"
        "other = logging.getLogger('PIL')\nother.debug('other debug')\nother.info('other info')\n"
        "other.warning('other warning')\n"
    )
    assert [json.loads(line)["message"] for line in stderr_of(level, "json", code)] == expected


def test_warnings_become_log_lines() -> None:
    (line,) = stderr_of("info", "json", "warnings.warn('old', UserWarning)")
    assert json.loads(line)["logger"] == "py.warnings"
    assert "UserWarning: old" in json.loads(line)["message"]


def test_a_second_call_takes_the_place_of_the_first() -> None:
    code = "configure('info', 'text', 'supervisor')\nlog.info('once')"
    (line,) = stderr_of("info", "json", code)
    assert line.endswith("supervisor: once")


def test_lines_of_several_processes_do_not_mix() -> None:
    program = (
        "import logging, sys\n"
        "from dinov3_server.log import configure\n"
        "configure('info', 'json', sys.argv[1])\n"
        "for n in range(200):\n    logging.getLogger('dinov3_server').info('%d ' + 'x' * 1000, n)\n"
    )
    shell = f"for i in 1 2 3 4; do '{sys.executable}' -c \"$0\" $i & done; wait"
    done = subprocess.run(["sh", "-c", shell, program], capture_output=True, timeout=LIMIT, check=True)
    lines = [json.loads(line) for line in done.stderr.decode().splitlines()]
    seen = {(line["process"], line["message"].split()[0]) for line in lines}
    assert len(lines) == len(seen) == 800
