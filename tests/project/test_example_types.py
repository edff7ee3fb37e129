"""The Python examples of the pages pass mypy --strict, as in the code of a user who checks types."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.project.test_python_examples import RUN
from tests.support.paths import ROOT

# What the examples use without defining it, which the text around them explains.
NAMES = """
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from PIL import Image

from dinov3_client import Client, Features, ImageViews, View
from dinov3_client.testing import FakeServer, MODEL

class Batch:
    student: torch.Tensor
    teacher: list[ImageViews]

FLIP_LEFT_RIGHT = Image.Transpose.FLIP_LEFT_RIGHT
F: Any
InterpolationMode: Any
RandomResizedCrop: Any
batches: list[list[str | bytes]]
client: Client
device: torch.device
distance: Any
epochs: int
features: Features
file: str
hflip: Callable[[Image.Image], Image.Image]
i: int
image: Image.Image
images: torch.Tensor
interpolation: Image.Resampling
jpeg: bytes
loader: list[Batch]
path: str
resized_crop: Callable[..., Image.Image]
scale: tuple[float, float]
ratio: tuple[float, float]
size: Any
student: Any
view: View
weight: np.ndarray[Any, np.dtype[np.float32]]
top: int
left: int
height: int
width: int
"""


@pytest.mark.timeout(600)  # mypy reads torch, where no cache is left of an earlier run
def test_examples_pass_mypy(tmp_path: Path) -> None:
    for number, example in enumerate(RUN):
        code = textwrap.indent(example.code.replace(", ...]", "]"), "    ")  # "and so on", in a list of arguments
        name = re.sub(r"\W", "_", example.page)
        (tmp_path / f"{name}_{number}.py").write_text(f"{NAMES}\ndef example() -> None:\n{code}")
    command = [sys.executable, "-m", "mypy", "--strict", "--disable-error-code=import-not-found"]
    done = subprocess.run([*command, *tmp_path.glob("*.py")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
