"""Truncated files: decoded as Pillow does with ImageFile.LOAD_TRUNCATED_IMAGES, but only where a request allows it."""

from __future__ import annotations

import io
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from dinov3_server.errors import InvalidInput
from dinov3_server.images.decode import File
from dinov3_serving.pillow import truncated_files
from tests.server.images.files import Pixels, encode, exif, photo
from tests.server.images.test_damaged import SEEDS

MAX_PIXELS = 1_000_000
# Warning filters that decode.py sets on import, which pytest replaces for every test.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

LARGE = Image.fromarray(photo(120, 90))
FILES = {
    **{name: data for name, data in SEEDS.items() if "16-bit" not in name and "float" not in name},
    "large jpeg": encode(LARGE, "JPEG", quality=90),
    "large png": encode(LARGE, "PNG"),
    "large gif": encode(LARGE, "GIF"),
    "large bmp": encode(LARGE, "BMP"),
    "large webp": encode(LARGE, "WEBP"),
    "large tiff": encode(LARGE, "TIFF", compression="tiff_lzw"),
}
# Formats of which Pillow decodes what there is.
LENIENT = {"large jpeg", "large png", "large gif", "large bmp"}


def with_pillows_flag(monkeypatch: pytest.MonkeyPatch, data: bytes) -> Pixels | None:
    """Return Pillow's own pixels with the flag set for the whole process; None if it refuses the file."""
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except Exception:  # of many kinds
            return None
        image.info.pop("transparency", None)
        return np.asarray(image.convert("RGB"))


def decoded(data: bytes, allow: bool) -> Pixels | None:
    try:
        return np.asarray(File(data, MAX_PIXELS, allow_truncated=allow).decode())
    except InvalidInput:
        return None


@pytest.mark.parametrize("name", FILES)
def test_pixels_of_truncated_files_are_pillows_with_its_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FILES[name]
    draws = random.Random(name)
    more = 0
    for length in sorted(draws.sample(range(1, len(data)), 24)):
        cut = data[:length]
        theirs, ours = with_pillows_flag(monkeypatch, cut), decoded(cut, True)
        assert (ours is None) == (theirs is None), length
        if ours is not None and theirs is not None:
            np.testing.assert_array_equal(ours, theirs, err_msg=str(length))
        strict = decoded(cut, False)
        if strict is not None:  # nothing that matters was missing
            np.testing.assert_array_equal(strict, ours, err_msg=str(length))
        more += strict is None and ours is not None
    assert more > 8 or name not in LENIENT


@pytest.mark.parametrize("name", FILES)
def test_whole_and_damaged_files_are_pillows_with_its_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = random.Random(name)
    for trial in range(12):
        data = bytearray(FILES[name])
        for _ in range(trial % 4):
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        ours = decoded(bytes(data), True)
        if ours is not None:  # else it may be larger than this process can hold
            theirs = with_pillows_flag(monkeypatch, bytes(data))
            assert theirs is not None
            np.testing.assert_array_equal(ours, theirs)


def test_a_truncated_png_is_turned_by_the_exif_before_its_pixels() -> None:
    data = encode(LARGE, "PNG", exif=exif(6))
    file = File(data[:-500], MAX_PIXELS, True, allow_truncated=True)
    assert file.decode().size == (120, 90)
    assert file.read_size() == (90, 120)


def test_threads_do_not_disturb_each_other() -> None:
    """One thread allows truncated files while another one decodes strictly."""
    cut = FILES["large jpeg"][:-300]
    inside, done = threading.Event(), threading.Event()

    def allow() -> bool:
        with truncated_files(True):
            inside.set()
            done.wait()
            return bool(ImageFile.LOAD_TRUNCATED_IMAGES)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(allow)
        inside.wait()
        try:
            assert not ImageFile.LOAD_TRUNCATED_IMAGES
            assert decoded(cut, False) is None
            assert decoded(cut, True) is not None
            assert decoded(cut, False) is None
        finally:
            done.set()
        assert other.result()


def test_what_a_program_sets_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (True, False):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", value)
        with truncated_files(False):
            assert bool(ImageFile.LOAD_TRUNCATED_IMAGES) == value
        with truncated_files(True):
            assert ImageFile.LOAD_TRUNCATED_IMAGES
        assert bool(ImageFile.LOAD_TRUNCATED_IMAGES) == value


def test_many_threads_at_once() -> None:
    cut = FILES["large png"][: len(FILES["large png"]) // 2]
    expected = decoded(cut, True)
    assert expected is not None

    def decode(index: int) -> bool:
        pixels = decoded(cut, index % 2 == 0)
        return pixels is None if index % 2 else pixels is not None and bool((pixels == expected).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(decode, range(400)))
