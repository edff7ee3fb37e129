"""The shapes benchmark: its requests and arithmetic."""

from __future__ import annotations

from bench import shapes
from bench.shapes import Block


def test_requests_are_of_all_sizes_and_the_same_in_both_processes() -> None:
    requests = [shapes.request(number) for number in range(2000)]
    assert requests == [shapes.request(number) for number in range(2000)]
    sides = {side for _, shape, _ in requests for side in (shape.height, shape.width)}
    assert sides == set(range(16, 321, 16))
    assert {images for images, _, _ in requests} == set(range(1, 9))
    assert {dtype for _, _, dtype in requests} == set(shapes.DTYPES)


def test_memory_is_the_most_and_ratios_are_of_blocks_that_both_answered() -> None:
    mib = 2**20
    blocks: list[tuple[Block, Block | None]] = [
        (Block(1.0, 2.0, 300 * mib), Block(1.1, 1.8, 400 * mib)),
        (Block(9.0, 9.0, 500 * mib), None),
        (Block(2.0, 4.0, 200 * mib), Block(1.8, 4.0, 700 * mib)),
        (Block(1.0, 1.0, 100 * mib), Block(1.0, 1.2, 100 * mib)),
    ]
    assert shapes.summary(blocks) == {"bounded_mib": 500, "unbounded_mib": 700, "rate": 1.0, "cpu": 1.0}
