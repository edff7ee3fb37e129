"""Real processes: one killed during a fetch, two that share a cache folder, and imports that a start avoids."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov3_server.provision.hub import fetch
from dinov3_server.provision.hub_api import Repository
from dinov3_server.provision.manifest import CheckOptions
from tests.server.provision.weights_rig import DATA, INDEX, SHARDS, TIMM, variant
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.file_server import Answer, FileServer
from tests.support.paths import ROOT
from tests.support.waiting import until

LVD_NAME = variant().official_file("lvd1689m")


@contextmanager
def process(cache_dir: Path, *arguments: str, endpoint: str = "http://127.0.0.1:1") -> Iterator[subprocess.Popen[str]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "DINOV3"))}
    environment = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache_dir / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.server.provision.weights_process", str(cache_dir), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def test_a_killed_fetch_resumes(hub: FakeHub, tmp_path: Path) -> None:
    first, second, third = SHARDS
    hub.publish(TIMM, {**SHARDS, **INDEX})
    hub.cdn.script(hub.blob(SHARDS[second]), Answer(hold_after=70_000))
    part = tmp_path / "weights" / TIMM.replace("/", "--") / COMMIT / f"{second}.part"
    with process(tmp_path, f"hf://{TIMM}", endpoint=hub.url) as child:
        until(lambda: part.exists() and part.stat().st_size, "bytes of the second shard")
        child.kill()
        child.wait()
    had = part.stat().st_size
    hub.cdn.release()
    folder = fetch(tmp_path, Repository(TIMM), CheckOptions(""))
    for name, data in SHARDS.items():
        assert (folder / name).read_bytes() == data
    assert hub.fetched() == [first, second, second, third]
    assert hub.cdn.ranges(hub.blob(SHARDS[second])) == [None, f"bytes={had}-"]
    assert not part.exists()


def test_two_processes_fetch_a_repository_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {"model.safetensors": DATA})
    hub.cdn.script(hub.blob(DATA), Answer(hold_after=100))
    with process(tmp_path, "auto", endpoint=hub.url) as one:
        until(hub.fetched, "the first process at the file")
        with process(tmp_path, "auto", endpoint=hub.url) as two:
            assert two.stderr is not None
            until(lambda: "another process is doing it" in (two.stderr.readline()), "the second waits")
            hub.cdn.release()
            out = [child.communicate()[0] for child in (one, two)]
    assert [child.returncode for child in (one, two)] == [0, 0]
    assert out[0] == out[1] == f"{tmp_path}/weights/{TIMM.replace('/', '--')}/{COMMIT}/model.safetensors True\n"
    assert hub.fetched() == ["model.safetensors"]


def test_two_processes_fetch_a_url_once(files: FileServer, tmp_path: Path) -> None:
    files.put(f"/{LVD_NAME}", DATA)
    files.script(f"/{LVD_NAME}", Answer(hold_after=100))
    with process(tmp_path, files.url(f"/{LVD_NAME}")) as one:
        until(lambda: files.requests, "the first process at the file")
        with process(tmp_path, files.url(f"/{LVD_NAME}")) as two:
            assert two.stderr is not None
            until(lambda: "another process is doing it" in (two.stderr.readline()), "the second waits")
            files.release()
            out = [child.communicate()[0] for child in (one, two)]
    assert out == [f"{tmp_path}/weights/{LVD_NAME} False\n"] * 2
    assert len(files.requests) == 1


def test_a_start_with_everything_in_place_does_not_import_huggingface_hub(hub: FakeHub, tmp_path: Path) -> None:
    hub.publish(TIMM, {**SHARDS, **INDEX})
    folder = fetch(tmp_path, Repository(TIMM), CheckOptions(""))
    for arguments in (["auto"], [f"hf://{TIMM}"], [f"hf://{TIMM}", "offline"]):
        with process(tmp_path, *arguments) as child:
            assert child.communicate()[0] == f"{folder} False\n"
