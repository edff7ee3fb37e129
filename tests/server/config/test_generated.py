"""The generated parts of docs/ and deploy/ are up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov3_server.config.load import load
from dinov3_server.config.settings import SETTINGS, Settings
from tests.server.config.generated import ROOT, generated


@pytest.mark.parametrize("name", ["docs/configuration.md", "docs/metrics.md", "deploy/config.yaml"])
def test_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text() == generated()[ROOT / name], "run: python -m tests.server.config.generated"


def test_example_config_has_every_setting_with_its_default(tmp_path: Path) -> None:
    example = (ROOT / "deploy/config.yaml").read_text()
    assert load({"config": str(ROOT / "deploy/config.yaml")}, {})[0] == Settings()  # All comments.

    unset = [f"#{setting.name}: " for setting in SETTINGS if setting.default in (None, "")]
    lines = [
        line.removeprefix("#")
        if line[:1] == "#" and line[1:2].isalpha() and not line.startswith(tuple(unset))
        else line
        for line in example.splitlines()
    ]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(lines))
    settings, sources = load({"config": str(path)}, {})
    assert settings == Settings()
    assert [name for name, source in sources.items() if source == "default"] == [
        setting.name for setting in SETTINGS if setting.default in (None, "")
    ]
