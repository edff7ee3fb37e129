"""The command in an install without the server's packages."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib

import pytest

from dinov3_server.__main__ import NEEDED
from tests.support.paths import ROOT


@pytest.mark.parametrize("argv", [[], ["--help"], ["serve", "--weights", "random:0"]])
def test_without_the_packages_of_the_server_the_extra_is_named(argv: list[str]) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({NEEDED}))\n"  # None: as if not installed
        "from dinov3_server.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"only its client: {', '.join(NEEDED)} cannot be found" in done.stderr
    assert "pip install 'dinov3-serving[server]'" in done.stderr


def test_with_them_the_command_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dinov3_server", "models"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "dinov3_vits16" in done.stdout


def test_the_checked_packages_are_those_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["dinov3-server"] == "dinov3_server.__main__:main"
    extras = project["optional-dependencies"]
    names = {entry.split(">")[0].split("[")[0] for extra in ("server", "torch") for entry in extras[extra]}
    providers = importlib.metadata.packages_distributions()
    needed = {providers[name][0].lower().replace("_", "-") for name in NEEDED}
    assert needed == names - {"dinov3-serving", "pillow"}  # the client has a Pillow, too
