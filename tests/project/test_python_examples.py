"""The Python examples of the pages run as they stand, against the fake server.

Only what this machine cannot have is replaced: the address of the server, a GPU, processes of a DataLoader.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dinov3_client import Client, ImageViews, View
from dinov3_client import cli as client_cli
from dinov3_client.testing import MODEL, FakeServer
from dinov3_server import cli as server_cli
from dinov3_server.config.settings import SETTINGS
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REPLACED = {
    ", ...]": "]",  # "and so on", in a list of arguments
    '"cuda"': '"cpu"',
    "pin_memory=True": "",
    "num_workers=4": "num_workers=0",
}
# What a page calls "your code", and the server that its test runs against.
YOUR_CODE = """
import numpy as np
from dinov3_client import Client

def cache_features(target, files, out):
    with Client(target) as client:
        features = client.extract(files, "patches")
    for file, patches in zip(files, features.patches):
        np.savez(out / file.with_suffix(".npz").name, patches=patches)

"""


class Size(NamedTuple):
    width: int
    height: int


class Example(NamedTuple):
    page: str
    language: str
    code: str


def examples() -> Iterator[Example]:
    for page in PAGES:
        for language, code in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            yield Example(page.name, language, code)


EXAMPLES = list(examples())
RUN = [each for each in EXAMPLES if each.language == "python" and not re.match(r"# \w+\.py", each.code)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A server, in a folder with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    (tmp_path / "photos/cats").mkdir(parents=True)
    for name in ("cat.jpg", "dog.jpg", "coffee.png", "photos/cats/0001.jpg"):
        Image.fromarray(pixels).save(name)
    Path("configs/teachers").mkdir(parents=True)
    Path("configs/teachers/dinov3.yaml").write_text(f"patch_size: {MODEL.patch_size}\ndevice: cpu\n")
    with FakeServer() as server:
        assert client_cli.main(["extract", "photos/", "--out", "features", "--target", server.target]) == 0
        yield server


def names(client: Client) -> dict[str, Any]:
    """Return what the examples use without defining it, which the text around them explains."""
    view = View(crop=(0, 0, 128, 128), size=224)
    jpeg = Path("cat.jpg").read_bytes()
    image = Image.new("RGB", (256, 256))

    def resized_crop(image: Image.Image, top: int, left: int, height: int, width: int, *_: Any) -> Image.Image:
        return image.crop((left, top, left + width, top + height)).resize((224, 224))

    def hflip(image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    return {
        "Client": Client,
        "FLIP_LEFT_RIGHT": Image.Transpose.FLIP_LEFT_RIGHT,
        "F": SimpleNamespace(resized_crop=resized_crop, hflip=hflip),
        "FakeServer": FakeServer,
        "Image": Image,
        "ImageViews": ImageViews,
        "InterpolationMode": SimpleNamespace(BICUBIC="bicubic"),
        "MODEL": MODEL,
        "RandomResizedCrop": SimpleNamespace(get_params=lambda image, scale, ratio: (0, 0, 128, 128)),
        "View": View,
        "batches": [["cat.jpg"], ["dog.jpg", jpeg]],
        "client": client,
        "device": "cpu",
        "distance": lambda mine, teachers: 0.0,
        "epochs": 2,
        "features": client.extract([jpeg], ("cls", "patches", "registers"), layers=[-4, 0], dtype="int8", size=224),
        "file": "cat.jpg",
        "grpc": grpc,
        "hflip": hflip,
        "i": 0,
        "image": image,
        "images": np.zeros((2, 3, 224, 224), np.float32),
        "interpolation": Image.Resampling.BICUBIC,
        "jpeg": jpeg,
        "loader": [SimpleNamespace(student=torch.zeros(1), teacher=[ImageViews("cat.jpg", [view])])] * 2,
        "path": "cat.jpg",
        "random": random,
        "ratio": (3 / 4, 4 / 3),
        "replace": replace,
        "resized_crop": resized_crop,
        "scale": (0.32, 1.0),
        "size": Size(224, 224),
        "student": lambda crops: (crops, crops),
        "torch": torch,
        "view": view,
        "weight": np.zeros((64, 768), np.float32),
        **dict(zip(("top", "left", "height", "width"), (0, 0, 128, 128), strict=True)),
    }


@pytest.mark.parametrize("example", RUN, ids=lambda each: f"{each.page}-{each.code.splitlines()[0][:40]}")
def test_example_runs(example: Example, server: FakeServer) -> None:
    code = example.code.replace("localhost:50051", server.target)
    for written, here in REPLACED.items():
        code = code.replace(written, here)
    with Client(server.target) as client:
        exec(compile(code, example.page, "exec"), names(client))


def test_most_examples_are_found() -> None:
    assert len(RUN) > 15


def test_the_example_of_a_test_passes(tmp_path: Path) -> None:
    """Its files, named in their first lines, in a pytest of their own."""
    files = [each.code for each in EXAMPLES if each.language == "python" and each not in RUN]
    assert len(files) == 2
    for code in files:
        name = code.splitlines()[0].split()[1].rstrip(":")
        (tmp_path / name).write_text((YOUR_CODE if name.startswith("test_") else "") + code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout


YAML = [each for each in EXAMPLES if each.language == "yaml" and not each.code.startswith("# kustomization.yaml")]


@pytest.mark.parametrize("example", YAML, ids=lambda each: each.page)
def test_yaml_has_settings(example: Example) -> None:
    assert set(yaml.safe_load(example.code)) <= {setting.name for setting in SETTINGS}


def test_the_example_of_config_is_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = [each.code for each in EXAMPLES if each.language == "console"]
    command, *lines = example.splitlines()
    assert command == "$ DINOV3_PORT=6000 dinov3-server config --weights random:0"
    monkeypatch.setenv("DINOV3_PORT", "6000")
    assert server_cli.main(["config", "--weights", "random:0"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all(line.split() in printed for line in lines if line != "...")
