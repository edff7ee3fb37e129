"""Answers that do not fit their request are refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dinov3_client import (
    Client,
    ImageViews,
    InvalidResponse,
    View,
)
from dinov3_client.testing import FakeServer
from dinov3_serving.v1 import feature_service_pb2 as pb


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(projections={"narrow": np.ones((5, 24))}) as server:
        yield server


def photo(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


BROKEN: dict[str, tuple[dict[str, Any], Callable[[pb.ExtractResponse], object], str]] = {
    "no views": (
        {"views": True},
        lambda r: r.blocks[0].ClearField("view_indices"),
        "a block of 4 rows has 0 view indices; the request has views",
    ),
    "views of none": (
        {},
        lambda r: r.blocks[0].view_indices.extend([0, 0]),
        "a block of 2 rows has 2 view indices; the request has no views",
    ),
    "views out of order": (
        {"views": True},
        lambda r: r.blocks[0].view_indices.__setitem__(slice(0, 2), [1, 0]),
        r"rows are not in order.*views \[1, 0, 0, 1\]",
    ),
    "no such view": (
        {"views": True},
        lambda r: r.blocks[0].view_indices.__setitem__(3, 2),
        r"the answer to 2 images has the rows \[0, 0, 1, 1\] and views \[0, 1, 0, 2\]",
    ),
    "rows twice": ({}, lambda r: r.blocks.append(r.blocks[0]), r"the answer to 2 images has rows twice: \[0, 1\]"),
    "a view is missing": (
        {"views": True},
        lambda r: _keep(r.blocks[0], 3),
        r"neither features nor an error for the images \[1\]",
    ),
    "pooling ignored": (
        {"pooling": (2, 2)},
        lambda r: _regrid(r.blocks[0]),
        r"asked for patches pooled to \(2, 2\), patches has a grid of \(1, 4\)",
    ),
    "channels first ignored": (
        {"channels_first": True},
        lambda r: r.blocks[0].patches.shape.__setitem__(slice(None), [2, 24, 24]),
        r"must be \[rows, D, grid height, grid width\]",
    ),
    "projection ignored": (
        {"projection": "narrow"},
        lambda r: setattr(r, "fingerprint", "f00d"),
        "asked for the projection 'narrow', the answer's fingerprint, 'f00d', has none",
    ),
    "no scales": (
        {"dtype": "int8"},
        lambda r: r.blocks[0].cls.ClearField("scales"),
        r"cls of shape \[2, 24\] and int8 has 0 bytes of scales",
    ),
    "scales of floats": (
        {},
        lambda r: setattr(r.blocks[0].cls, "scales", bytes(8)),
        r"cls of shape \[2, 24\] and float16 has 8 bytes of scales",
    ),
    "too few scales": (
        {"dtype": "int8"},
        lambda r: setattr(r.blocks[0].patches, "scales", bytes(8)),
        r"patches of shape \[2, 24, 24\] and int8 has 8 bytes of scales",
    ),
    "empty": (
        {},
        lambda r: r.blocks[0].cls.CopyFrom(pb.Tensor(dtype=r.blocks[0].cls.dtype, shape=[2, 0])),
        r"cls of shape \[2, 0\] and float16 has 0 bytes",
    ),
}


def _keep(block: pb.FeatureBlock, rows: int) -> None:
    for indices in (block.image_indices, block.view_indices):
        del indices[rows:]
    for tensor in (block.cls, block.patches):
        tensor.data = tensor.data[: len(tensor.data) // tensor.shape[0] * rows]
        tensor.shape[0] = rows


def _regrid(block: pb.FeatureBlock) -> None:
    block.grid_height, block.grid_width = 1, 4


@pytest.mark.parametrize("case", BROKEN)
def test_answers_are_checked(client: Client, server: FakeServer, case: str) -> None:
    asked, server.edit, message = BROKEN[case]
    asked = {"preset": "none", "on_error": "return", **asked}
    pictures: list[Any] = [photo(), photo(seed=1)]
    if asked.pop("views", False):
        pictures = [ImageViews(picture, [View(), View(flip=True)]) for picture in pictures]
    with pytest.raises(InvalidResponse, match=message):
        client.extract(pictures, **asked)
