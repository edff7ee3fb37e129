"""What `images` may be besides what test_extract tries: files, tables of paths, tensors, streams."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov3_client import Client, ImageViews, View
from dinov3_client import _reading as reading
from dinov3_client.testing import FakeServer, expected
from tests.client.adapters import EXACT, Adapter, check, photos, png

PHOTOS = photos(3)
FILES = [png(photo) for photo in PHOTOS]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    found = [tmp_path / f"{index}.png" for index in range(len(FILES))]
    for path, file in zip(found, FILES, strict=True):
        path.write_bytes(file)
    return list(map(str, found))


class OwnPath:
    """An os.PathLike that is no pathlib.Path."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path


SPELLINGS: dict[str, Callable[[list[str]], Any]] = {
    "open files": lambda paths: [open(path, "rb") for path in paths],  # noqa: SIM115, PTH123
    "BytesIO": lambda paths: map(io.BytesIO, FILES),
    "PathLike": lambda paths: [OwnPath(path) for path in paths],
    "array of str": np.array,
    "array of objects": lambda paths: np.array(paths, object),
    "tuple": tuple,
    "dict's values": lambda paths: dict(enumerate(paths)).values(),
    "uint8 CHW tensors": lambda paths: [torch.from_numpy(photo).permute(2, 0, 1) for photo in PHOTOS],
    "uint8 HWC tensors": lambda paths: [torch.from_numpy(photo) for photo in PHOTOS],
    "uint8 tensor NCHW": lambda paths: torch.from_numpy(PHOTOS).permute(0, 3, 1, 2),
    "uint8 tensor NHWC": lambda paths: torch.from_numpy(PHOTOS),
    "views of tensors": lambda paths: [ImageViews(torch.from_numpy(photo), [View()]) for photo in PHOTOS],
    "generator": lambda paths: (path for path in paths),
    "generator of files": lambda paths: (io.BytesIO(file) for file in FILES),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_every_spelling_of_images_gives_the_same_features(client: Client, paths: list[str], spelling: str) -> None:
    check(client.extract(SPELLINGS[spelling](paths), **EXACT), PHOTOS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)], ids=["CHW", "HWC"])
def test_tensors_of_floats_are_normalized_pixels(client: Client, dtype: torch.dtype, order: Any) -> None:
    pixels = torch.linspace(-2, 2, 3 * 32 * 48).reshape(3, 32, 48).to(dtype)
    given = pixels.permute(order).requires_grad_()
    for images in (given, given[None], [given]):
        features = client.extract(images, **EXACT)
        np.testing.assert_array_equal(features.patches[0], expected(pixels.float().numpy(), "patches"))


def test_a_file_is_read_once_from_its_position(client: Client) -> None:
    file = io.BytesIO(b"header" + FILES[0])
    file.seek(6)
    check(client.extract(file, **EXACT), PHOTOS[:1])
    with pytest.raises(ValueError, match=r"images\[0\] is a file object with nothing left to read: .*seek\(0\)"):
        client.extract(file)


def test_batches_may_be_files(adapter: type[Adapter], server: FakeServer, paths: list[str]) -> None:
    with adapter(server.target) as one, tempfile.NamedTemporaryFile() as file:
        file.write(FILES[0])
        file.seek(0)
        first, second = one.many([file, map(io.BytesIO, FILES[1:])], **EXACT)
    check(first, PHOTOS[:1])
    check(second, PHOTOS[1:])


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "dict": (
        {"image": 1, "label": 2},
        TypeError,
        r"images is a dict with the keys 'image', 'label'; .*batch\['image'\]",
    ),
    "row": ([{"bytes": b"", "path": ""}], TypeError, r"images\[0\] is a dict .*batch\['bytes'\]"),
    "url": (
        ["https://example.com/a.jpg"],
        ValueError,
        r"images\[0\] is the URL 'https://.*does not fetch; give its bytes",
    ),
    "s3": ("s3://bucket/a.jpg", ValueError, r"images\[0\] is the URL 's3://bucket/a.jpg'"),
    "data": ("data:image/png;base64,AAAA", ValueError, "base64.b64decode"),
    "file": ("file:///a.jpg", ValueError, "give the path alone"),
    "text file": (io.StringIO("text"), TypeError, r"opened as text; open it with mode 'rb'"),
    "ambiguous": (torch.zeros(3, 16, 3, dtype=torch.uint8), ValueError, r"uint8 \[3, 16, 3\]: both sides could be"),
    "gray": (torch.zeros(16, 16, dtype=torch.uint8), ValueError, r"a tensor of uint8 \[16, 16\]; allowed are uint8"),
    "no channels": (torch.zeros(16, 16, 1), ValueError, "neither side has 3 channels"),
    "int64": (torch.zeros(3, 16, 16, dtype=torch.int64), ValueError, r"a tensor of int64 \[3, 16, 16\]; allowed"),
    "bytes array": (np.array([b"a.jpg"]), ValueError, r"an array of bytes40 \[1\]; .*and arrays of paths"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_image_is_named(client: Client, server: FakeServer, case: str) -> None:
    images, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        client.extract(images)
    assert not server.calls


def test_a_stream_of_images_is_sent_while_it_is_read(
    adapter: type[Adapter], server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WINDOW_NBYTES", 4 * len(FILES[0]))
    many, read = photos(30), 0
    sent: list[int] = []

    def images() -> Iterator[bytes]:
        nonlocal read
        for photo in many:
            sent.append(sum(len(request.images) for request in server.requests))
            read += 1
            yield png(photo)

    with adapter(server.target) as one:
        check(one.extract(images(), **EXACT), many)
    assert all(read - sent <= 5 for read, sent in enumerate(sent))  # a window that ends at 4 to 5 images
    assert {request.fingerprint for request in server.requests} == {"f00d"}


def test_a_long_list_of_files_is_read_in_windows(
    client: Client, server: FakeServer, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WINDOW_NBYTES", 1)
    paths[1:1] = ["missing.png"]
    features = client.extract(paths, on_error="return", **EXACT)
    assert [len(request.images) for request in server.requests] == [1, 1, 1]
    for place, photo in zip((0, 2, 3), PHOTOS, strict=True):
        np.testing.assert_array_equal(features.patches[place], expected(photo, "patches"))
    assert list(features.errors) == [1]


def test_torch_is_not_imported_for_tensors(server: FakeServer) -> None:
    code = (
        "import sys, numpy, dinov3_client\n"
        "dinov3_client.Client(sys.argv[1]).extract(numpy.zeros((32, 32, 3), 'u1'))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, server.target], check=True)


def test_floats_that_cannot_be_normalized_are_refused_or_warned_of(client: Client, server: FakeServer) -> None:
    good = np.linspace(-2, 2, 3 * 32 * 32, dtype=np.float32).reshape(3, 32, 32)
    with pytest.raises(ValueError, match=r"images\[1\] has values from -200 to 200; .*normalized by the model's"):
        client.extract([good, good * 100], preset="none")
    assert not server.requests
    features = client.extract([good, good * 100], on_error="return", **EXACT)
    assert list(features.errors) == [1]
    assert "-200 to 200" in str(features.errors[1])
    np.testing.assert_array_equal(features.patches[0], expected(good, "patches"))
    with pytest.warns(UserWarning, match="all values of images are within 0 to 1"):
        client.extract([np.abs(good) / 2, np.abs(good) / 3], preset="none")
