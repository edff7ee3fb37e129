"""The operators benchmark: the functions that it names exist, and few operators have no name."""

from __future__ import annotations

import pytest
import torch

from bench import operators
from bench.bare import our_batch
from dinov3_server.backbone.runner import build
from dinov3_server.families.registry import lookup
from dinov3_server.nn.linear import packs


@pytest.mark.skipif(not packs(torch.empty(1, 1, dtype=torch.bfloat16)), reason="dense layers are not packed here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators_have_names(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "BATCHES", 1)
    runner = build("vits16", "random:0", dtype=dtype, warm_up=())
    times = operators.operator_times(our_batch(runner, 64, operators.IMAGES), lookup("vits16"), 64)
    expected = {"LayerNorm", "RoPE", "gather", "patch embedding", "finite check", operators.BETWEEN}
    expected |= set(operators.dense_layers(lookup("vits16"), 64).values())
    assert expected <= times["ms"].keys()
    attention = {kind for kind in times["ms"] if kind.startswith("attention: ")}
    assert attention & {"attention: fused kernel", "attention: products"}
    shown = operators.show({"rows": [{"model": "vits16", "dtype": dtype, "size": 64, "batch": 8, **times}]})
    assert all(kind in shown for kind in times["ms"])


def test_a_dense_layer_is_known_by_its_shapes() -> None:
    for name in ("vits16", "vitb16"):
        for size in (224, 512):
            assert len(operators.dense_layers(lookup(name), size)) == 5, "two layers of one shape"
