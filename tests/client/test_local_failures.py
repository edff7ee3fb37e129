"""`on_error="return"` for images that the client itself cannot read."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3_client import Client, ImageErrors, ImageViews, InvalidRequest, MessageTooLarge, View
from dinov3_client.testing import MODEL, FakeServer, expected
from dinov3_client.torch import with_features
from tests.client.adapters import EXACT, Adapter, photos, png
from tests.support.waiting import LIMIT

GOOD = photos(2)


def truncated() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    image = Image.open(io.BytesIO(png(noise)[:2000]))
    image.filename = "truncated.png"  # as of a file that was opened by its path
    return image


def failing(tmp_path: Path) -> dict[str, tuple[Any, str]]:
    """Images that cannot be read, and what their errors say."""
    return {
        "missing": (tmp_path / "missing.jpg", r"\(.*missing\.jpg\): No such file or directory"),
        "folder": (tmp_path, "Is a directory"),
        "truncated": (truncated(), r"\(truncated\.png\): .*cannot be decoded: .*truncated"),
        "mode": (Image.new("I", (32, 32)), "mode I, which has no 8-bit values"),
        "array": (np.zeros((32, 32), np.uint8), r"an array of uint8 \[32, 32\]"),
        "url": ("https://example.com/a.jpg", "does not fetch"),
        "null": ("a\0b", "null"),
        "read": (io.BytesIO(), "nothing left to read"),
        "views": (ImageViews(str(tmp_path / "missing.jpg"), [View()]), "No such file"),
    }


CASES = ("missing", "folder", "truncated", "mode", "array", "url", "null", "read", "views")


@pytest.mark.parametrize("case", CASES)
def test_an_unreadable_image_costs_only_its_own_row(
    adapter: type[Adapter], server: FakeServer, tmp_path: Path, case: str
) -> None:
    bad, message = failing(tmp_path)[case]
    images = [GOOD[0], bad, GOOD[1]]
    with adapter(server.target) as one:
        features = one.extract(images, on_error="return", layers=3, **EXACT)
        (again,) = one.many([[GOOD[0], failing(tmp_path)[case][0], GOOD[1]]], on_error="return", **EXACT)
        with pytest.raises((OSError, ValueError)):
            one.extract(images)
    for found in (features, again):
        assert found.images.tolist() == [0, 1, 2]
        for row, photo in zip((0, 2), GOOD, strict=True):
            np.testing.assert_array_equal(found.patches[row], expected(photo, "patches"))
            np.testing.assert_array_equal(found[row].cls, expected(photo, "cls"))
        assert not found.patches[1].any()
    error = features[1].error
    assert isinstance(error, InvalidRequest)
    assert features.errors == {1: error}
    with pytest.raises(InvalidRequest, match=f"^image 1.*{message}"):
        raise error
    assert error.image == 1
    assert error.violations[0].field == "images[1]"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_errors_of_the_server_are_numbered_within_the_call(client: Client, server: FakeServer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    images = [tmp_path / "missing.jpg", GOOD[0], ImageViews(broken, [View(), View()]), GOOD[1]]
    features = client.extract(images, on_error="return", **EXACT)
    assert list(features.errors) == [0, 2]
    assert str(features.errors[2]).startswith(f"image 2 ({broken}): ")
    assert features.errors[2].violations[0].field.startswith("images[2]")
    assert features.images.tolist() == [0, 1, 2, 2, 3]
    np.testing.assert_array_equal(features.patches[4], expected(GOOD[1], "patches"))
    with pytest.raises(ImageErrors, match=rf"1 of 2 images failed: image 1 \({broken}\): the file"):
        client.extract([GOOD[0], broken])


def test_a_call_in_which_nothing_can_be_read_sends_no_request(client: Client, server: FakeServer) -> None:
    features = client.extract(["a.jpg", ImageViews("b.jpg", [View(), View()])], on_error="return", layers=[-1])
    assert features.images.tolist() == [0, 1, 1]
    assert features.fingerprint == MODEL.fingerprint
    assert [features[row].error is not None for row in range(3)] == [True] * 3
    assert features.patches.shape[0] == 3
    assert not server.requests


def test_an_image_over_the_message_limit_costs_only_its_own_row() -> None:
    model = replace(MODEL, limits=replace(MODEL.limits, max_message_bytes=100_000))
    with FakeServer(model) as server, Client(server.target, deadline=LIMIT) as client:
        images = [GOOD[0], b"x" * 200_000, GOOD[1]]
        features = client.extract(images, "cls", on_error="return", **EXACT)
        with pytest.raises(MessageTooLarge):
            client.extract(images, "cls", **EXACT)
    assert isinstance(features.errors[1], MessageTooLarge)
    assert str(features.errors[1]).startswith("image 1: a message is over the limit")
    for row, photo in zip((0, 2), GOOD, strict=True):
        np.testing.assert_array_equal(features.cls[row], expected(photo, "cls"))


def test_an_epoch_survives_missing_files(client: Client, tmp_path: Path) -> None:
    batches = [[GOOD[0], str(tmp_path / "missing.jpg")], [str(tmp_path / "missing.jpg")], [GOOD[1]]]
    loader = with_features(batches, client, to_request=lambda batch: batch, on_error="return", **EXACT)
    assert [list(features.errors) for _, features in loader] == [[1], [0], []]
