"""Runs hold every row once, in order, and merge contiguous rows."""

from __future__ import annotations

import dataclasses

from dinov3_server.backbone.runners.plan import (
    Run,
    batch_output_specs,
    batch_outputs,
    feature_runs,
    pixel_runs,
)
from dinov3_server.models.interface import Batch, FeatureSpec, ModelInfo, Output, OutputSpec, PixelShape, Row

SHAPE = PixelShape(32, 48, "uint8")
INFO = ModelInfo(
    name="tiny",
    weights="",
    random_weights=True,
    fingerprint="",
    dtype="float32",
    device="cpu",
    layer_dims=(4, 8),
    layer_strides=(8, 16),
    register_tokens=4,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    parameters=0,
)
CLS, PATCHES = Output("cls"), Output("patches")
BOTH = FeatureSpec((CLS, PATCHES), "float32")
ONE = FeatureSpec((PATCHES,), "float16")
PIXELS = SHAPE.nbytes
CLS_BYTES, PATCH_BYTES = 8 * 4, 6 * 8 * 4


def rows(count: int, *, arena: int = 0, start: int = 0, spec: FeatureSpec = BOTH) -> list[Row]:
    """A request: contiguous pixels, then contiguous rows of each output."""
    cls = start + count * PIXELS
    patches = cls + count * CLS_BYTES
    return [
        Row(
            arena,
            pixel_offset=start + i * PIXELS,
            output_offsets=tuple(
                offset
                for output, offset in ((CLS, cls + i * CLS_BYTES), (PATCHES, patches + i * PATCH_BYTES))
                if output in spec.outputs
            ),
            spec=spec,
        )
        for i in range(count)
    ]


def test_one_request_is_one_run() -> None:
    batch = Batch(SHAPE, tuple(rows(5, start=1000)))
    assert pixel_runs(batch) == [Run(0, (1000,), BOTH, 0, 5)]
    (run,) = feature_runs(batch, INFO)
    assert (run.first, run.count, run.spec) == (0, 5, BOTH)
    assert run.offsets == (1000 + 5 * PIXELS, 1000 + 5 * PIXELS + 5 * CLS_BYTES)


def test_requests_of_other_arenas_specs_and_places_are_runs_of_their_own() -> None:
    batch = Batch(SHAPE, tuple(rows(2) + rows(2, arena=1) + rows(1, arena=1, spec=ONE) + rows(3, start=99_000)))
    assert [(run.arena, run.first, run.count) for run in pixel_runs(batch)] == [
        (0, 0, 2),
        (1, 2, 2),
        (1, 4, 1),
        (0, 5, 3),
    ]
    assert [(run.arena, run.first, run.count) for run in feature_runs(batch, INFO)] == [
        (0, 0, 2),
        (1, 2, 2),
        (1, 4, 1),
        (0, 5, 3),
    ]
    assert batch_outputs(batch) == [CLS, PATCHES]
    specs = (OutputSpec(CLS, "float32"), OutputSpec(PATCHES, "float16"), OutputSpec(PATCHES, "float32"))
    assert batch_output_specs(batch) == batch_output_specs(Batch(batch.shape, batch.rows[::-1]))
    assert sorted(batch_output_specs(batch)) == sorted(specs)


def test_adjacent_pixels_with_scattered_features() -> None:
    first, second, third = rows(3)
    moved = dataclasses.replace(second, output_offsets=(second.output_offsets[0], second.output_offsets[1] + 4))
    batch = Batch(SHAPE, (first, moved, third))
    assert len(pixel_runs(batch)) == 1
    assert [run.count for run in feature_runs(batch, INFO)] == [1, 1, 1]


def test_rows_in_the_wrong_order_are_not_a_run() -> None:
    batch = Batch(SHAPE, tuple(reversed(rows(2))))
    assert [run.count for run in pixel_runs(batch)] == [1, 1]
    assert [run.count for run in feature_runs(batch, INFO)] == [1, 1]


def test_strides_are_those_of_the_requested_dtype() -> None:
    half = FeatureSpec((CLS,), "bfloat16")
    pair = (Row(0, 0, (5000,), half), Row(0, PIXELS, (5000 + 8 * 2,), half))
    assert feature_runs(Batch(SHAPE, pair), INFO) == [Run(0, (5000,), half, 0, 2)]


def test_adjacent_rows_of_another_arena_or_spec_are_separate_runs() -> None:
    cls, patches = FeatureSpec((CLS,), "float32"), FeatureSpec((PATCHES,), "float32")
    row = Row(0, 0, (9000,), cls)
    elsewhere = Row(1, PIXELS, (9000 + CLS_BYTES,), cls)
    other_spec = Row(0, PIXELS, (9000 + PATCH_BYTES,), patches)
    assert len(pixel_runs(Batch(SHAPE, (row, elsewhere)))) == 2
    assert len(feature_runs(Batch(SHAPE, (row, elsewhere)), INFO)) == 2
    assert len(pixel_runs(Batch(SHAPE, (row, other_spec)))) == 1
    assert len(feature_runs(Batch(SHAPE, (row, other_spec)), INFO)) == 2
