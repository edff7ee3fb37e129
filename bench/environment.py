"""Environments beside `.venv`, for programs whose packages cannot share it: of benchmarks and `make integrations`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.record import ROOT


class EnvironmentMissing(Exception):
    """An environment could not be made here, for the given reason."""


def python_of(name: str, *packages: str, interpreter: str | os.PathLike[str] = sys.executable) -> Path:
    """Return the Python of `.venv-NAME`, which holds the pins of constraints/NAME.txt and `packages` (pip's arguments).

    The environment is made on first use, and again when the pins or the packages change.

    Raises:
        EnvironmentMissing: there is no such interpreter, or pip failed.
    """
    folder, pinned = ROOT / f".venv-{name}", ROOT / "constraints" / f"{name}.txt"
    python, made_from = folder / "bin" / "python", folder / "made-from.txt"
    content = "\n".join([pinned.read_text(), *packages])
    if not made_from.is_file() or made_from.read_text() != content:
        if not Path(interpreter).exists():
            raise EnvironmentMissing(f"there is no {interpreter}")
        print(f"making {folder.name} from {pinned.relative_to(ROOT)}", flush=True)
        run(interpreter, "-m", "venv", "--clear", folder)
        run(python, "-m", "pip", "install", "--quiet", "-r", pinned, *packages)
        made_from.write_text(content)
    return python


def run(*command: str | os.PathLike[str], cwd: Path = ROOT) -> None:
    """Run a command that makes an environment. Raises EnvironmentMissing with its last lines if it fails."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        tail = " ".join(done.stdout.splitlines()[-3:])
        raise EnvironmentMissing(f"{' '.join(map(str, command))} failed: {tail}")
