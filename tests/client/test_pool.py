"""Which connection a call takes: no channel is real, the frontends that a kernel deals are drawn at random."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from dinov3_client._transport.pool import FIRST_BACKOFF, LONGEST_BACKOFF, MAX_CONNECTIONS, MAX_REDIALS, Connection, Pool


class World:
    """A clock, and channels that are numbers: `dialled` are their targets."""

    def __init__(self, *targets: str, connections: int | None = None, first: int = 0) -> None:
        self.seconds = 100.0
        self.dialled: list[str] = []
        self.pool = Pool(targets, connections, self.dial, now=lambda: self.seconds, first=first)

    def dial(self, target: str) -> int:
        self.dialled.append(target)
        return len(self.dialled) - 1

    def serve(self, frontends: int, deal: Callable[[], int], calls: int, at_once: int) -> Counter[int]:
        """`calls` calls of which `at_once` are in flight all the time: how many each frontend had of the last half."""
        dealt: dict[int, int] = {}
        in_flight: list[Connection] = []
        had: Counter[int] = Counter()
        for call in range(calls):
            while len(in_flight) < at_once:
                in_flight.append(self.pool.acquire())
            connection = in_flight.pop(0)
            frontend = dealt.setdefault(connection.channel, deal())
            self.pool.release(connection)
            # The first answer is GetModel's, which tells of all.
            self.pool.answered(connection, frontend, None if call else frontends)
            had[frontend] += call >= calls // 2
        for connection in in_flight:
            self.pool.release(connection)
        return had


def hold(world: World, count: int) -> list[Connection]:
    return [world.pool.acquire() for _ in range(count)]


def test_calls_in_turn_share_a_connection() -> None:
    world = World("a:1", connections=4)
    for _ in range(5):
        world.pool.release(world.pool.acquire())
    assert world.dialled == ["a:1"]


def test_connections_are_opened_as_calls_need_them_and_then_shared_evenly() -> None:
    world = World("a:1", connections=3)
    held = hold(world, 7)
    assert len(world.dialled) == 3
    assert sorted(Counter(one.channel for one in held).values()) == [2, 2, 3]
    world.pool.release(held[1])
    world.pool.release(held[4])
    assert held[1] is held[4]
    assert world.pool.acquire() is held[1]  # the fewest in flight


@pytest.mark.parametrize(("frontends", "expected"), [(1, 1), (3, 3), (50, MAX_CONNECTIONS)])
def test_by_default_there_are_as_many_as_frontends(frontends: int, expected: int) -> None:
    world = World("a:1")
    first = world.pool.acquire()
    world.pool.answered(first, 0, frontends)
    hold(world, 60)
    assert len(world.dialled) == expected


@pytest.mark.parametrize("frontends", [2, 4, 8])
def test_connections_are_spread_over_the_frontends(frontends: int) -> None:
    uneven = 0
    for seed in range(40):
        world = World("a:1")
        deal = random.Random(seed)
        had = world.serve(frontends, lambda deal=deal: deal.randrange(frontends), 80 * frontends, 2 * frontends)
        assert len(world.dialled) <= frontends * (1 + MAX_REDIALS)
        uneven += len(had) < frontends or max(had.values()) > 1.5 * min(had.values())
    assert uneven <= 2


def test_more_connections_than_frontends_are_spread_evenly() -> None:
    world = World("a:1", connections=6)
    deal = random.Random(7)
    had = world.serve(3, lambda: deal.randrange(3), 600, 12)
    assert max(had.values()) <= 1.2 * min(had.values())


def test_a_kernel_that_deals_one_frontend_only_is_not_hammered() -> None:
    world = World("a:1")
    assert world.serve(4, lambda: 0, 2000, 8) == {0: 1000}
    assert len(world.dialled) == 4 * (1 + MAX_REDIALS)


def test_a_dns_target_is_not_dialled_again() -> None:
    world = World("dns:///a:1")
    world.serve(4, lambda: 0, 100, 8)
    assert len(world.dialled) == 4


def test_a_retired_connection_is_closed_once_its_calls_are_done() -> None:
    world = World("a:1", connections=2)
    first, second, third = hold(world, 3)
    assert first is third
    for one in (first, second):
        world.pool.answered(one, 0, 2)
    assert world.pool.take_idle() == []  # the second one's call is still in flight
    world.pool.release(second)
    assert world.pool.take_idle() == [second.channel]
    assert world.pool.take_idle() == []
    assert world.pool.acquire().channel == 2  # in its place, since the first is busy


def test_a_target_that_failed_is_left_alone_while_others_live() -> None:
    world = World("a:1", "b:1")
    failing = world.pool.acquire()
    world.pool.failed(failing, None)
    world.pool.release(failing)
    assert {one.target.name for one in hold(world, 6)} == {"b:1"}
    world.seconds += FIRST_BACKOFF
    assert world.pool.acquire().target.name == "a:1"


def test_back_off_doubles_up_to_a_limit() -> None:
    world = World("a:1", "b:1")
    failing = world.pool.acquire()
    rests = []
    for _ in range(8):
        world.pool.failed(failing, None)
        world.pool.failed(failing, None)  # a call that failed with it is no second failure
        rests.append(failing.target.backoff_until - world.seconds)
        world.seconds = failing.target.backoff_until
    assert rests[:3] == [FIRST_BACKOFF, 2 * FIRST_BACKOFF, 4 * FIRST_BACKOFF]
    assert rests[-1] == LONGEST_BACKOFF
    world.pool.answered(failing, 0)
    world.pool.failed(failing, None)
    assert failing.target.backoff_until - world.seconds == FIRST_BACKOFF


def test_back_off_lasts_as_long_as_the_server_asks() -> None:
    world = World("a:1", "b:1")
    failing = world.pool.acquire()
    world.pool.failed(failing, 1.5)
    assert failing.target.backoff_until - world.seconds == 1.5
    world.seconds += 1.5
    world.pool.failed(failing, 600.0)  # a start may take less, and the others share the work meanwhile
    assert failing.target.backoff_until - world.seconds == LONGEST_BACKOFF


def test_where_all_rest_the_next_to_wake_is_taken() -> None:
    world = World("a:1", "b:1")
    first, second = hold(world, 2)
    world.pool.failed(first, 2.0)
    world.pool.failed(second, 1.0)
    assert not world.pool.has_alternative(())
    assert world.pool.acquire().target is second.target
    world.seconds += 1.5
    assert world.pool.has_alternative(())
    assert not world.pool.has_alternative([second.target])


def test_a_target_to_avoid_is_taken_only_where_there_is_no_other() -> None:
    world = World("a:1", "b:1")
    first = world.pool.acquire()
    assert world.pool.acquire([first.target]).target is not first.target
    assert world.pool.acquire([first.target]).target is not first.target
    alone = World("a:1")
    assert alone.pool.acquire([alone.pool.acquire().target]).target.name == "a:1"


def test_targets_share_the_calls_from_another_start_each() -> None:
    for first, order in ((0, ["a:1", "b:1", "c:1"]), (1, ["b:1", "c:1", "a:1"]), (5, ["c:1", "a:1", "b:1"])):
        world = World("a:1", "b:1", "c:1", first=first)
        assert [one.target.name for one in hold(world, 6)] == order * 2
        # Also one after the other.
        quiet = World("a:1", "b:1", "c:1", first=first)
        taken = []
        for _ in range(4):
            connection = quiet.pool.acquire()
            taken.append(connection.target.name)
            quiet.pool.release(connection)
        assert taken == [*order, order[0]]


def test_connections_spread_again_after_a_restart_with_other_frontends() -> None:
    world = World("a:1")
    world.serve(4, lambda: 0, 400, 8)
    spent = len(world.dialled)
    for _ in range(4):
        connection = world.pool.acquire()
        world.pool.failed(connection, None)
        world.pool.release(connection)
    deal = random.Random(3)
    had = world.serve(2, lambda: deal.randrange(2), 400, 8)
    assert len(had) == 2
    assert spent < len(world.dialled) <= spent + 4 * (1 + MAX_REDIALS)


def test_fewer_frontends_need_no_more_dials() -> None:
    world = World("a:1")
    deal = iter([0, 1, 2, 3])
    world.serve(4, lambda: next(deal, 0), 80, 8)
    before = len(world.dialled)
    world.serve(1, lambda: 0, 80, 8)
    assert len(world.dialled) == before


def test_closed() -> None:
    world = World("a:1", connections=2)
    held = hold(world, 2)
    assert sorted(world.pool.close()) == [one.channel for one in held]
    assert world.pool.close() == []
    with pytest.raises(ValueError, match="this client is closed"):
        world.pool.acquire()


def test_a_frontend_of_any_number_is_only_a_number() -> None:
    """The wire has 2**32 of them; to go through all takes minutes."""
    world = World("a:1", connections=2)
    for connection in hold(world, 2):
        world.pool.answered(connection, 2**32 - 1)
    assert len(world.pool.take_idle()) == 0
    for connection in hold(world, 2):
        world.pool.release(connection)
    assert len(world.dialled) == 3
