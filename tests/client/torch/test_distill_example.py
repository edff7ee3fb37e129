"""examples/distill.py against a fake server: the teacher sees the student's pixels, and the loop trains."""

from __future__ import annotations

import importlib.util
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dinov3_client import Client
from dinov3_client.testing import MODEL, FakeServer, expected
from tests.support.paths import ROOT

PATH = ROOT / "examples" / "distill.py"


@pytest.fixture(scope="module")
def distill() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("distill_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_teacher_sees_the_students_pixels(distill: Any) -> None:
    random.seed(1)
    photos = distill.Photos(distill.PHOTOS[1:3], repeats=1, views=3, size=32, model=MODEL)
    crops = distill.collate([photos[0], photos[1]])
    assert len({view.crop for one in crops.teacher for view in one.views}) == 6
    assert {view.flip for one in crops.teacher for view in one.views} == {False, True}
    with FakeServer() as server, Client(server.target) as client:
        features = client.extract(crops.teacher, dtype="float32")
    shown = crops.student * torch.tensor(MODEL.std).view(3, 1, 1) + torch.tensor(MODEL.mean).view(3, 1, 1)
    pixels = (shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(features.patches, [expected(image, "patches") for image in pixels])


def test_crops_are_drawn_as_torchvision_draws_them(distill: Any) -> None:
    random.seed(2)
    drawn = [distill.random_resized_crop(300, 200, scale=(0.2, 0.9)) for _ in range(500)]
    for top, left, height, width in drawn:
        assert 0 <= top <= top + height <= 200
        assert 0 <= left <= left + width <= 300
        assert 0.2 * 0.95 <= height * width / (300 * 200) <= 0.9 * 1.05
        assert 3 / 4 * 0.95 <= width / height <= 4 / 3 * 1.05
    # As likely wide as high, and from border to border.
    wide = Counter(width > height for _, _, height, width in drawn)
    assert math.isclose(wide[True], wide[False], rel_tol=0.5)
    assert {0 in {top for top, *_ in drawn}, 0 in {left for _, left, *_ in drawn}} == {True}
    # Where none fits, the largest in the middle.
    assert distill.random_resized_crop(900, 100, scale=(1.0, 1.0)) == (0, (900 - 133) // 2, 100, 133)
    assert distill.random_resized_crop(100, 900, scale=(1.0, 1.0)) == ((900 - 133) // 2, 0, 133, 100)


def test_it_trains_and_prints_each_epoch(
    distill: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "PHOTOS", distill.PHOTOS[1:3])
    flags = "--epochs 3 --photos 2 --views 2 --repeats 4 --size 32 --workers 0 --device cpu"
    with FakeServer() as server:
        monkeypatch.setattr(sys, "argv", ["distill.py", "--target", server.target, *flags.split()])
        distill.main()
    output = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"epoch \d: loss ([0-9.]+), .* waiting for features\n", output)]
    assert len(losses) == 3
    assert losses[2] < losses[0]
