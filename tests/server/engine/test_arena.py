"""The arena: ranges never overlap, all of them are freed, and too little memory fails at start."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3_server.engine.arena import PAGE, Arena, ArenaMapping
from dinov3_server.errors import StartupError
from tests.support.waiting import open_descriptors


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * PAGE)), max_size=60))
def test_ranges_never_overlap_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(16 * PAGE)
    try:
        live: dict[int, int] = {}
        for allocate, amount in steps:
            if allocate:
                offset = arena.allocate(amount)
                if offset is None:
                    continue
                assert offset >= 0
                assert offset + amount <= arena.nbytes
                assert all(offset + amount <= other or other + length <= offset for other, length in live.items())
                live[offset] = amount
            elif live:
                offset = sorted(live)[amount % len(live)]
                del live[offset]
                arena.free(offset)
            assert arena.used_bytes >= sum(live.values())
        for offset in live:
            arena.free(offset)
        assert arena.used_bytes == 0
        assert arena.allocate(16 * PAGE) == 0  # neighbors were merged into one range
    finally:
        arena.close()


def test_a_full_arena_allocates_none_and_a_freed_range_is_reused() -> None:
    arena = Arena(2 * PAGE)
    first, second = arena.allocate(PAGE), arena.allocate(1)
    assert (first, second) == (0, PAGE)
    assert arena.allocate(1) is None
    arena.free(0)
    assert arena.allocate(PAGE) == 0
    arena.close()


def test_another_mapping_sees_the_same_bytes() -> None:
    arena = Arena(PAGE)
    other = ArenaMapping(arena.fd, arena.nbytes)
    arena.memory[:3] = b"abc"
    assert bytes(other.memory[:3]) == b"abc"
    other.close()
    arena.close()


def test_too_little_memory_fails_at_start_and_leaves_no_descriptor_open() -> None:
    before = open_descriptors()
    with pytest.raises(StartupError, match="--arena-bytes"):
        Arena(1 << 60)
    assert open_descriptors() == before
