"""The pace of a device, learned from the batches that it ran."""

from __future__ import annotations

import pytest

from dinov3_server.engine.pace import INITIAL_SECONDS_PER_TOKEN, MARGIN, MOST_SHAPES, TRUST_SECONDS, BatchTime, Pace

TOKENS = 200


def observe(pace: Pace, seconds_of: dict[int, float], times: int = 1, now: float = 0.0, shape: str = "a") -> float:
    """Run batches of each size, `times` over, and return the time after them."""
    for _ in range(times):
        for rows, seconds in seconds_of.items():
            now += seconds
            pace.observe(BatchTime(shape, TOKENS, rows, seconds), now)
    return now


def test_a_device_without_batches_counts_as_slow() -> None:
    pace = Pace()
    assert not pace.known
    assert not pace.trusted(0.0)
    assert pace.seconds_per_token == INITIAL_SECONDS_PER_TOKEN
    assert pace.batch_seconds("a", TOKENS, 4, 0.0) == pytest.approx(
        4 * TOKENS * INITIAL_SECONDS_PER_TOKEN * (1 + MARGIN)
    )


def test_the_first_batch_replaces_the_initial_estimate() -> None:
    pace = Pace()
    now = observe(pace, {8: 0.4})
    assert pace.seconds_per_token == pytest.approx(0.4 / (8 * TOKENS))
    assert pace.batch_seconds("a", TOKENS, 16, now) == pytest.approx(0.8 * (1 + MARGIN))
    assert pace.rows_within("a", TOKENS, 0.4 * (1 + MARGIN), now) == 8
    assert pace.rows_within("a", TOKENS, 0.01, now) == 0


def test_batches_of_several_sizes_reveal_the_fixed_part() -> None:
    pace = Pace()
    now = observe(pace, {rows: 0.010 + 0.0002 * rows for rows in (1, 2, 32, 8)}, times=20)
    for rows in (1, 8, 16, 32):
        truth = (0.010 + 0.0002 * rows) * (1 + MARGIN)
        assert pace.batch_seconds("a", TOKENS, rows, now) == pytest.approx(truth, rel=0.2)
    assert 25 <= pace.efficient_rows("a", TOKENS, now) <= 75
    assert pace.efficient_rows("b", TOKENS, now) == 1, "a shape without batches has no fixed part"


def test_a_change_of_speed_is_learned_within_two_seconds_of_device_time() -> None:
    pace = Pace()
    now = observe(pace, {8: 0.1, 4: 0.05}, times=50)
    observe(pace, {8: 0.3, 4: 0.15}, times=5, now=now)
    assert pace.seconds_per_token > 0.8 * 0.3 / (8 * TOKENS)
    now = observe(pace, {8: 0.1, 4: 0.05}, times=14, now=now)
    assert pace.seconds_per_token < 1.3 * 0.1 / (8 * TOKENS)


def test_a_shape_that_has_not_run_for_long_is_estimated_from_the_others() -> None:
    pace = Pace()
    now = observe(pace, {8: 0.1})
    now = observe(pace, {8: 0.4}, times=30, now=now, shape="b")
    assert pace.batch_seconds("a", TOKENS, 8, now) == pytest.approx(0.4 * (1 + MARGIN), rel=0.01)


def test_the_estimate_of_an_idle_device_is_not_trusted() -> None:
    pace = Pace()
    now = observe(pace, {8: 0.1})
    assert pace.trusted(now + 1.9)
    assert not pace.trusted(now + 2.1)
    assert pace.known


def test_the_number_of_remembered_shapes_is_limited() -> None:
    pace = Pace()
    for shape in range(2 * MOST_SHAPES):
        pace.observe(BatchTime(shape, TOKENS, 1, 0.001), 0.0)
    assert len(pace._fits) == MOST_SHAPES


def test_the_tokens_left_of_a_running_batch_become_fewer_but_never_negative() -> None:
    pace = Pace()
    now = observe(pace, {8: 0.4})
    assert pace.tokens_left(8 * TOKENS, now, now) == 8 * TOKENS
    assert pace.tokens_left(8 * TOKENS, now, now + 0.1) == pytest.approx(6 * TOKENS, abs=1)
    assert pace.tokens_left(8 * TOKENS, now, now + 5.0) == 0


def test_after_a_pause_the_first_batch_replaces_the_estimate() -> None:
    """One batch of 25 seconds, as when the machine was suspended, must not count as 25 seconds of short ones."""
    pace = Pace()
    now = observe(pace, {1: 25.0}) + TRUST_SECONDS
    observe(pace, {1: 0.02}, now=now + 0.1)
    assert pace.seconds_per_token == pytest.approx(0.02 / TOKENS)
    assert pace.batch_seconds("a", TOKENS, 1, now) == pytest.approx(0.02 * (1 + MARGIN))


def test_the_margin_follows_the_errors_of_the_predictions() -> None:
    pace = Pace()
    now = observe(pace, {8: 0.4}, times=20)
    assert pace.margin == MARGIN, "a steady device"
    for seconds in (0.2, 0.6) * 20:
        now = observe(pace, {8: seconds}, now=now)
    assert 0.5 < pace.margin < 2.0
    for _ in range(60):
        now = observe(pace, {8: 0.4}, now=now)
    assert pace.margin == MARGIN
