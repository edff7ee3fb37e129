"""The virtual environment of PyTriton, created on first use from constraints/pytriton.txt.

PyTriton needs numpy below 2, so it cannot share ours. The environment uses the distribution's python3, because
PyTriton's worker processes load its shared library; most other builds of Python have none.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from bench.record import ROOT

INTERPRETER = Path("/usr/bin/python3")
FOLDER = ROOT / ".venv-pytriton"
PINNED = ROOT / "constraints" / "pytriton.txt"


class PyTritonMissing(Exception):
    """PyTriton cannot run here, for the given reason."""


def pytriton_python() -> Path:
    """Return the environment's interpreter; create the environment first if it is missing or its pins have changed."""
    python, made_from = FOLDER / "bin" / "python", FOLDER / "made-from.txt"
    pins = PINNED.read_text()
    if not made_from.is_file() or made_from.read_text() != pins:
        if not INTERPRETER.exists():
            raise PyTritonMissing(f"there is no {INTERPRETER}, the distribution's Python")
        print(f"making {FOLDER.name} from {PINNED.relative_to(ROOT)}", flush=True)
        _run(INTERPRETER, "-m", "venv", "--clear", FOLDER)
        _run(python, "-m", "pip", "install", "--quiet", "-r", PINNED)
        made_from.write_text(pins)
    return python


def _run(*command: str | os.PathLike[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        tail = " ".join(done.stdout.splitlines()[-3:])
        raise PyTritonMissing(f"{' '.join(map(str, command))} failed: {tail}")
