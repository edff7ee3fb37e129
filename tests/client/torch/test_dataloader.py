"""Real DataLoaders, their workers forked and spawned, beside a client and within the workers; a real server."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dinov3_client import Client, Features
from dinov3_client.torch import with_features
from dinov3_server.models.interface import Output
from tests.support.numpy_runner import expected
from tests.support.server import Server

# Of Python from 3.12 on, wherever a process with threads is forked, as DataLoader does it.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

OPTIONS: Any = {"outputs": ("cls", "patches"), "preset": "none", "dtype": "float32"}
BATCH = 4


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--frontends", "2") as server:
        yield server


def image(index: int) -> NDArray[np.uint8]:
    return np.random.default_rng(index).integers(0, 250, (32, 48, 3), np.uint8)


class Photos(Dataset[torch.Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(image(index))


class Extracted(Photos):
    """Features of each photo, asked for in the worker."""

    def __init__(self, count: int, client: Client) -> None:
        super().__init__(count)
        self.client = client

    def __getitem__(self, index: int) -> torch.Tensor:
        cls = self.client.extract(image(index), **OPTIONS).cls
        return torch.from_numpy(np.array(cls))


class Collated(Extracted):
    """Arrays as the client gives them, for torch's collation."""

    def __getitem__(self, index: int) -> Any:
        warnings.simplefilter("error")
        features = self.client.extract(image(index), **OPTIONS)
        return {"cls": features.cls[0], "patches": torch.from_numpy(features[0].patches), "image": features.images}


def check(index: int, batch: torch.Tensor, features: Features) -> None:
    images = [image(index * BATCH + i) for i in range(BATCH)]
    np.testing.assert_array_equal(batch.numpy(), images)
    assert features.cls is not None
    assert features.patches is not None
    np.testing.assert_array_equal(features.cls, [expected(one, Output("cls")) for one in images])
    np.testing.assert_array_equal(features.patches, [expected(one, Output("patches")) for one in images])


@pytest.mark.parametrize(("context", "persistent"), [("fork", False), ("fork", True), ("spawn", False)])
def test_epochs_with_workers_beside_the_client(server: Server, context: str, persistent: bool) -> None:
    loader = DataLoader(
        Photos(10 * BATCH),
        batch_size=BATCH,
        num_workers=2,
        multiprocessing_context=context,
        persistent_workers=persistent,
    )
    with server.client() as client:
        stream = with_features(loader, client, to_request=torch.Tensor.numpy, prefetch=3, **OPTIONS)
        for epoch in range(3 if context == "fork" else 2):
            seen = 0
            for index, (batch, features) in enumerate(stream):
                check(index, batch, features)
                seen += 1
                if epoch == 0 and index == 4:
                    break  # with calls in flight; the next epoch forks
            assert seen == (5 if epoch == 0 else 10)
            assert stream.stats.images == seen * BATCH


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_client_used_in_workers(server: Server, context: str) -> None:
    """Forked from a process that has used it, or pickled."""
    with server.client() as client:
        client.extract(image(0), **OPTIONS)
        loader = DataLoader(Extracted(12, client), batch_size=BATCH, num_workers=2, multiprocessing_context=context)
        for _ in range(2 if context == "fork" else 1):
            rows = torch.cat(list(loader)).numpy()
            np.testing.assert_array_equal(rows[:, 0], [expected(image(index), Output("cls")) for index in range(12)])
            # And it still works where it came from.
            client.extract(image(0), **OPTIONS)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_collating_the_arrays_of_a_client_in_a_worker_warns_of_nothing(server: Server, context: str) -> None:
    with server.client() as client:
        loader = DataLoader(Collated(8, client), batch_size=BATCH, num_workers=1, multiprocessing_context=context)
        rows = torch.cat([batch["cls"] for batch in loader]).numpy()
        np.testing.assert_array_equal(rows, [expected(image(index), Output("cls")) for index in range(8)])


def test_a_client_used_in_workers_and_beside_them(server: Server) -> None:
    """Two epochs without persistent workers: each forks after the calls of the one before."""
    with server.client() as client:
        loader = DataLoader(Extracted(8, client), batch_size=BATCH, num_workers=2, multiprocessing_context="fork")
        stream = with_features(loader, client, to_request=lambda _: np.stack([image(0)]), prefetch=3, **OPTIONS)
        for _ in range(2):
            rows = [(batch, features) for batch, features in stream]
            np.testing.assert_array_equal(
                torch.cat([batch for batch, _ in rows]).numpy()[:, 0],
                [expected(image(index), Output("cls")) for index in range(8)],
            )
            for _, features in rows:
                assert features.cls is not None
                np.testing.assert_array_equal(features.cls[0], expected(image(0), Output("cls")))
