from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3_client.cli import main
from dinov3_client.testing import FakeServer

Run = Callable[..., int]


def pattern(seed: int, height: int = 96, width: int = 128) -> np.ndarray[Any, Any]:
    """Smooth enough to survive resizing, different for each seed."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * (c + 1) + y * (seed + 1)) / 40 + c) for c in range(3)]
    return np.uint8(127 + 120 * np.stack(waves, -1))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def run(server: FakeServer) -> Run:
    return lambda *args: main([*map(str, args), "--target", server.target])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five, 128 pixels wide and 96 high."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(5):
        Image.fromarray(pattern(index)).save(folder / f"photo{index}.png")
    return folder


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """Stored 128 wide and 96 high, to be shown 96 wide and 128 high."""
    image = Image.fromarray(pattern(0))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    return tmp_path / "turned.png"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"no picture")
    return path


def shown(path: Path, pair: int, shape: tuple[int, int] = (240, 320)) -> tuple[Any, Any]:
    """The photo and the map, both `shape`, of a pair in a picture of one column."""
    height, width = shape
    top = 24 + 26 + pair * (height + 26 + 24)
    with Image.open(path) as opened:
        sheet = np.asarray(opened.convert("RGB")).astype(int)[top : top + height]
    return sheet[:, 24 : 24 + width], sheet[:, 24 + width + 8 : 24 + 2 * width + 8]


def cells(picture: Any, grid: tuple[int, int]) -> Any:
    """[rows, columns, 3]: the color in the middle of each patch of a map, of which each is one flat cell."""
    rows, columns = grid
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    blocks = picture.reshape(rows, height, columns, width, 3)
    return blocks[:, height // 2, :, width // 2]
