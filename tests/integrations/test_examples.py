"""Examples that need no more than this environment, against a server that computes features by a formula."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dinov3_client.testing import FakeServer
from tests.integrations.examples import Failed, Inputs, check_lines
from tests.integrations.inputs import write_photos, write_shards
from tests.support.paths import ROOT


def test_raw_stubs_print_what_the_client_gives(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "protos")}
    with FakeServer() as server:
        done = subprocess.run(
            [sys.executable, "examples/raw_stubs.py", *photos],
            cwd=ROOT,
            env={**environment, "DINOV3_TARGET": server.target},
            capture_output=True,
            text=True,
            check=True,
        )
        inputs = Inputs(server.target, photos, "", tmp_path)
        check_lines(inputs, done.stdout)
        lines = done.stdout.splitlines()
        with pytest.raises(Failed, match="wrong photos"):
            check_lines(inputs, "\n".join(lines[1:]))
        first, second = map(json.loads, lines[:2])
        swapped = [json.dumps(first | {"cls": second["cls"]}), *lines[1:]]
        with pytest.raises(Failed, match="cls differs"):
            check_lines(inputs, "\n".join(swapped))


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path)
    cells = json.loads((ROOT / "examples" / "features.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict[str, object] = {}
    with FakeServer() as server:
        monkeypatch.setenv("DINOV3_TARGET", server.target)
        monkeypatch.setenv("PHOTOS", str(tmp_path))
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)


def test_the_shards_hold_the_photos(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    assert write_shards(photos, tmp_path / "shards") == str(tmp_path / "shards" / "photos-{000000..000001}.tar")
    names = []
    for shard in (tmp_path / "shards").iterdir():
        with tarfile.open(shard) as tar:
            names += tar.getnames()
    assert sorted(names) == [photo.name for photo in photos]
