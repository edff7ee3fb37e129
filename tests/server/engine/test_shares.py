"""The shares of callers in a device."""

from __future__ import annotations

from collections import Counter

from dinov3_server.engine.shares import Caller, Shares


def give(shares: Shares, callers: list[Caller], turns: int, tokens: dict[Caller, int] | None = None) -> Counter[Caller]:
    """Serve the caller that ranks first, `turns` times, and return the tokens that each was given."""
    given: Counter[Caller] = Counter()
    for _ in range(turns):
        first = min(callers, key=shares.rank)
        portion = (tokens or {}).get(first, 1)
        shares.charge(first, portion)
        given[first] += portion
    return given


def entered(*callers: Caller) -> Shares:
    shares = Shares()
    for caller in callers:
        shares.enter(caller)
    return shares


def test_groups_share_equally_however_many_connections_each_has() -> None:
    callers = [Caller("a", str(i)) for i in range(9)] + [Caller("b", "0")]
    given = give(entered(*callers), callers, 1800)
    assert given[callers[-1]] == 900
    assert [given[caller] for caller in callers[:-1]] == [100] * 9


def test_shares_count_tokens_and_not_turns() -> None:
    large, small = Caller("a", ""), Caller("b", "")
    given = give(entered(large, small), [large, small], 1010, {large: 100, small: 1})
    assert abs(given[large] - given[small]) <= 100


def test_a_caller_saves_up_nothing_while_it_is_away() -> None:
    here, back = Caller("a", ""), Caller("b", "")
    shares = entered(here)
    give(shares, [here], 500)
    shares.enter(back)
    given = give(shares, [here, back], 100)
    assert abs(given[here] - given[back]) <= 2


def test_a_caller_that_took_much_still_owes_it_when_it_comes_back() -> None:
    fair, greedy = Caller("a", ""), Caller("b", "")
    shares = entered(fair, greedy)
    shares.charge(greedy, 1000)
    shares.charge(fair, 1)
    shares.leave(greedy)
    shares.enter(greedy)
    assert give(shares, [fair, greedy], 500)[greedy] == 0


def test_callers_without_jobs_are_forgotten() -> None:
    shares = Shares()
    for i in range(5000):
        caller = Caller(str(i), str(i))
        shares.enter(caller)
        shares.charge(caller, 1)
        shares.leave(caller)
    assert len(shares._groups.members) <= 1025
    assert len(shares._connections) <= 1025
