"""torch.compile over code that calls the client: the results are those without it, whatever the step does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dinov3_client import Client, Features
from dinov3_client.testing import MODEL, FakeServer
from dinov3_client.torch import RemoteDinoV3Teacher, with_features
from tests.support.waiting import LIMIT

PIXELS = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (2, 3, 32, 32), np.uint8))
PHOTOS = PIXELS.numpy().transpose(0, 2, 3, 1).copy()

# Of torch, where Python's own functions are called in a compiled loop.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with FakeServer() as server, Client(server.target, deadline=LIMIT) as client:
        yield client


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def check(step: Callable[..., Any], *given: Any) -> None:
    expected = step(*given)
    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(*given), expected, rtol=0, atol=0)


class Student(nn.Module):
    def __init__(self, client: Client) -> None:
        super().__init__()
        self.teacher = RemoteDinoV3Teacher({"device": "cpu"}, client=client)
        self.head = nn.Linear(MODEL.embed_dim, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.head(self.teacher(images)["cls_token"]).square().mean()
        return loss


def test_a_student_that_holds_the_teacher(client: Client) -> None:
    student = Student(client)
    check(student, PIXELS)
    torch.compile(student, backend="aot_eager")(PIXELS).backward()
    assert student.head.weight.grad is not None
    check(student.teacher, PIXELS)


def test_calls_in_a_step(client: Client) -> None:
    def extract(images: torch.Tensor) -> torch.Tensor:
        photos = images.numpy().transpose(0, 2, 3, 1).copy()
        cls = client.extract(photos, preset="none", dtype="float32").torch().cls
        assert cls is not None
        return cls.sum() * client.model().patch_size

    def stream(start: torch.Tensor) -> torch.Tensor:
        for _, features in with_features([PHOTOS] * 3, client, to_request=lambda batch: batch, preset="none"):
            cls = features.to("cpu", torch.float32).cls
            assert cls is not None
            start = start + cls.sum()
        return start

    check(extract, PIXELS)
    check(stream, torch.ones(1))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_features_that_are_given_to_a_step(client: Client, dtype: Any) -> None:
    def step(start: torch.Tensor, features: Features) -> torch.Tensor:
        here = features.torch()
        cls, patches, of_layer = here.cls, here.to("cpu").at_size(32).patches, here.layers[3].patches
        assert cls is not None
        assert patches is not None
        assert of_layer is not None
        arrays = torch.from_numpy(features.numpy()["cls"])
        return start + cls.sum() + patches.sum() + of_layer.sum() + arrays.sum() + len(features) * features.grid[0]

    check(step, torch.ones(1), client.extract(PHOTOS, preset="none", layers=[3], dtype=dtype))


def test_a_step_for_each_kind_of_arguments_is_not_compiled_again(client: Client) -> None:
    """Each call has other arrays and options: torch gives up after eight, with a warning."""

    def step(start: torch.Tensor, size: int) -> torch.Tensor:
        photos = np.zeros((1, size, size, 3), np.uint8)
        cls = client.extract(photos, preset="none", dtype="float32").torch().cls
        assert cls is not None
        return start + cls.sum()

    compiled = torch.compile(step, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for size in range(16, 16 * 12, 16):
            torch.testing.assert_close(compiled(torch.ones(1), size), step(torch.ones(1), size))
