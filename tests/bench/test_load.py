"""The load generator's arithmetic: which calls a measured time holds."""

from __future__ import annotations

import pytest

from bench.load import closed_loop, whole_batches


def bursts(sizes: list[int], apart: float) -> list[float]:
    """When answers end that come `sizes` at a time, a millisecond from one to the next in a burst."""
    return [burst * apart + 0.001 * i for burst, size in enumerate(sizes) for i in range(size)]


@pytest.mark.parametrize("cut", range(32))
def test_the_measured_time_holdswhole_batches_wherever_it_began(cut: int) -> None:
    ends = bursts([32] * 9, apart=0.6)[cut:]
    first, last = whole_batches(ends)
    assert (last - first) % 32 == 0
    assert (last - first) / (ends[last] - ends[first]) == pytest.approx(32 / 0.6)
    assert last - first >= len(ends) / 3


def test_single_answers_are_measured_too() -> None:
    ends = bursts([1] * 50, apart=0.02)
    first, last = whole_batches(ends)
    assert (last - first) / (ends[last] - ends[first]) == pytest.approx(50)


def test_too_few_calls_are_no_measurement() -> None:
    with pytest.raises(ValueError, match="5 calls ended"):
        whole_batches([0.0, 1.0, 2.0, 3.0, 4.0])


def test_an_error_of_a_caller_ends_the_loop() -> None:
    def fails() -> None:
        raise OSError("no server")

    with pytest.raises(OSError, match="no server"):
        closed_loop([fails], seconds=60.0)
