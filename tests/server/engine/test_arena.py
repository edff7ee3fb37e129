"""The arena: ranges never overlap, all of them are freed, and too little memory fails at start."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3_server import host
from dinov3_server.engine.arena import PAGE, Arena, ArenaMapping
from dinov3_server.errors import StartupError
from dinov3_server.host import available_memory
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


def test_available_memory_in_a_control_group_is_its_limit_minus_usage_without_file_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = available_memory()
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    limit, used, active, inactive = 64 << 20, 60 << 20, 30 << 20, 20 << 20
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\nfile {50 << 20}\nactive_file {active}\ninactive_file {inactive}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > everything // 2
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    assert available_memory() == limit - used + active + inactive
