"""The predicted wait of a request, by what is queued before it."""

from __future__ import annotations

from dinov3_server.engine.forecast import Demand, QueuedTokens
from dinov3_server.engine.messages import NO_LOAD, Load
from dinov3_server.engine.shares import Caller

HOG, SMALL = Caller("address", "1"), Caller("address", "2")
AWAY = Caller("elsewhere", "1")


def demand(images: int, caller: Caller = SMALL, bulk: bool = False) -> Demand:
    return Demand(images, 0, 10 * images, caller, bulk)


def waiting(*demands: Demand) -> QueuedTokens:
    queue = QueuedTokens()
    for each in demands:
        queue.add(each, each.tokens)
    return queue


def test_without_queued_requests_there_is_no_wait() -> None:
    assert QueuedTokens().ahead(demand(4), NO_LOAD, 0) == 0


def test_a_callers_own_requests_of_similar_size_go_first() -> None:
    queue = waiting(demand(4), demand(4), demand(64))
    assert queue.ahead(demand(4), NO_LOAD, 0) == 80, "the request of 64 images is overtaken"
    assert queue.ahead(demand(100), NO_LOAD, 0) == 80 + 640


def test_another_caller_gets_at_most_as_much_as_this_one() -> None:
    queue = waiting(*[demand(256, HOG)] * 4)
    assert queue.ahead(demand(1), NO_LOAD, 0) == 10
    assert queue.ahead(demand(32, AWAY), NO_LOAD, 0) == 320
    assert queue.ahead(demand(1, HOG), NO_LOAD, 0) == 0
    assert queue.ahead(demand(256, HOG), NO_LOAD, 0) == 4 * 2560


def test_connections_share_the_share_of_their_group() -> None:
    queue = waiting(demand(100, HOG), demand(100, AWAY))
    # When the small caller has received 10 tokens, so has the hog, and the other address 20.
    assert queue.ahead(demand(1), NO_LOAD, 0) == 10 + 20


def test_bulk_delays_interactive_work_by_a_third_at_most() -> None:
    queue = waiting(demand(30), demand(1000, HOG, bulk=True))
    assert queue.ahead(demand(30), NO_LOAD, 0) == 300 + 600 // 3
    assert queue.ahead(demand(30, bulk=True), NO_LOAD, 0) == 300 + 600, "bulk waits for both"


def test_each_other_frontend_counts_as_one_caller() -> None:
    others = Load(running=50, interactive=10_000, bulk=500)
    assert QueuedTokens().ahead(demand(1), others, 3) == 50 + 30 + 40 // 3
    assert QueuedTokens().ahead(demand(1), Load(running=50, interactive=20), 3) == 50 + 20


def test_the_upper_bound_is_never_below_the_estimate() -> None:
    queue = waiting(demand(30), demand(7, AWAY), demand(100, HOG, bulk=True))
    others = Load(5, 60, 70)
    for images in (1, 16, 300):
        for bulk in (False, True):
            assert queue.ahead(demand(images, bulk=bulk), others, 2) <= queue.most_ahead(others)


def test_dequeued_tokens_leave_no_entry() -> None:
    queue = waiting(demand(3), demand(5, HOG, bulk=True))
    queue.add(demand(3), -30)
    queue.add(demand(5, HOG, bulk=True), -50)
    assert queue.most_ahead(NO_LOAD) == 0
    assert not queue._tokens
