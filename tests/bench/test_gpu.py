"""The GPU benchmark without a GPU: its arithmetic, and a dry run of its sections."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.forward import forward, peak
from bench.gpu.goals import goals
from bench.gpu.models import bytes_for, fusible, native_model
from bench.gpu.pipeline import pipeline
from bench.gpu.plan import BOTH, Config, dry, full
from bench.gpu.service import request
from dinov3_server.families.dinov3_vit.model import VisionTransformer
from dinov3_server.nn.linear import Linear
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.backbone.features import every_output

CPU = torch.device("cpu")


@pytest.mark.parametrize("config", [Config("vits16", 224, 2), Config("vits16plus", 96, 1)], ids=["mlp", "swiglu"])
def test_flops_equal_the_count_of_torch(config: Config) -> None:
    plan = dry(CPU)
    model = native_model(plan, config.variant)
    # torch counts nothing for its fused attention on the CPU.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(bytes_for(plan, config), BOTH)
    assert counter.get_total_flops() == config.batch * config.flops


def test_rope_in_real_numbers_gives_the_same_features() -> None:
    plan, config = dry(CPU), Config("vits16", 64, 2)
    model = native_model(plan, config.variant)
    pixels, outputs = bytes_for(plan, config), every_output(config.variant.depth)
    with torch.inference_mode():
        expected = model(pixels, outputs)
        with fusible(model, config.size) as twin:
            for other in (twin, model):
                for output, features in other(pixels, outputs).items():
                    torch.testing.assert_close(features, expected[output], rtol=1e-4, atol=1e-5)


def test_the_model_is_built_as_on_a_gpu() -> None:
    model: VisionTransformer = native_model(dry(CPU), Config("vits16", 32, 1).variant)
    assert type(model._blocks[0].qkv) is Linear


def test_sections_run() -> None:
    plan, rows = dry(CPU), []
    for section in (peak, forward, pipeline):
        section(plan, rows.append)
    assert [row.get("outputs") for row in rows] == [None, None, "cls", "cls+patches"]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))


def test_every_section_of_a_full_run_has_a_budget_within_the_limit() -> None:
    from bench.gpu.__main__ import LIMIT, SECTIONS

    for plan in (dry(CPU), full(CPU)):
        assert list(plan.budgets) == list(SECTIONS)
    assert sum(full(CPU).budgets.values()) <= LIMIT


@pytest.mark.parametrize("source", ["raw", "jpeg"])
def test_requests_have_the_given_content(source: str) -> None:
    read = pb.ExtractRequest.FromString(request(Config("vits16", 64, 8), source, "cls", 3))
    assert read.outputs == pb.Outputs(cls=True, dtype=pb.DATA_TYPE_BFLOAT16)
    if source == "raw":
        assert list(read.pixels.shape) == [3, 64, 64, 3]
        assert len(read.pixels.data) == 3 * 64 * 64 * 3
    else:
        assert len(read.images) == 3
        assert read.images[0].encoded.startswith(b"\xff\xd8")
        assert (read.preprocessing.size.height, read.preprocessing.size.width) == (64, 64)


def test_goals_compare_the_same_configuration() -> None:
    def row(batch: int, size: int = 256, **rates: float) -> dict[str, Any]:
        return {"model": "vitl16", "size": size, "batch": batch, "images_per_second": rates, "teraflops": rates}

    result = {
        "peak": [{"teraflops": 700.0}, {"teraflops": 800.0}],
        "forward": [row(1, eager=100.0), row(64, eager=300.0, graph=400.0), row(64, size=224, graph=9000.0)],
        "service": [
            {"in": "raw", "outputs": "cls", "images_per_second": 360.0},
            {"in": "raw", "outputs": "cls+patches", "images_per_second": 200.0},
            {"in": "jpeg", "outputs": "cls", "images_per_second": 380.0},
        ],
        "baselines": [
            row(64, eager=300.0, graph=390.0, compiled=450.0, transformers_compiled=300.0),
            row(1, graph=9000.0),
        ],
    }
    assert [one["reached"] for one in goals(result)] == [0.5, 0.9, 0.5, 1.3, 1.5]
    assert [one["reached"] for one in goals({})] == [None] * 5
