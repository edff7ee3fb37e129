"""The client benchmark: every way to call receives and checks the same answers."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from bench import client, premade
from dinov3_client import Client
from dinov3_serving.v1 import feature_service_pb2 as pb


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with client.server() as address:
        yield address


@pytest.mark.parametrize("way", client.WAYS)
def test_every_row_receives_checked_answers(address: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    check = client.check_tensor if "torch" in way else client.check
    monkeypatch.setattr(client, check.__name__, lambda patches: (check(patches), checked.append(1)))
    run = client.run(way, address, seconds=0.05, warm_up=0.0)
    assert 0 < run.answers < len(checked)
    assert run.seconds >= 0.05
    assert run.cpu_seconds > 0


def test_what_the_server_has_is_what_the_client_reads(address: str) -> None:
    with Client(address) as one:
        features = one.extract(client.files(), "patches", **client.OPTIONS_OF_CALLS)
        assert one.model().embed_dim == 768
    assert features.grid == (14, 14)
    values = features.patches.astype(np.float32)
    assert values.shape == (32, 196, 768)
    assert (values.min(), values.max()) == (1, 1 + 126 / 128)
    assert np.array_equal(features.patches.view(np.uint16), client.sent())
    answer = pb.ExtractResponse.FromString(premade.answer(2))
    assert len(answer.blocks[0].patches.data) == premade.patches(2).nbytes


@pytest.mark.parametrize("wrong", ["bytes", "shape", "dtype"])
def test_wrong_answers_end_the_leg(wrong: str) -> None:
    patches = client.sent().view(ml_dtypes.bfloat16)
    client.check(patches)
    changed = patches.copy()
    changed.reshape(-1)[client.PAGE * 7] = 0
    given = {"bytes": changed, "shape": patches[:-1], "dtype": client.sent().view(np.float16)}[wrong]
    with pytest.raises(AssertionError):
        client.check(given)


def test_figures_are_medians_and_ratios_of_rounds() -> None:
    def one(answers: int) -> client.Run:
        return client.Run(answers, 1.0, 0.5)

    rounds = [
        {"extract_many": one(a), "naive": one(b), "bare": one(c)} for a, b, c in ((2, 1, 4), (9, 3, 9), (3, 1, 3))
    ]
    row = client.figures("extract_many", rounds)
    assert row["gb_per_second"] == round(3 * client.sent().nbytes / 1e9, 3)
    assert (row["of_bare"], row["of_naive"], row["client_cores"]) == (1.0, 3.0, 0.5)
    shown = client.show({"goal": 1.2, "rows": [row]})
    assert "extract_many" in shown
