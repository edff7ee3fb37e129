"""The contended benchmark: its arithmetic, and the process that it runs beside the server."""

from __future__ import annotations

import psutil
import pytest

from bench import contended


def test_a_rate_is_of_what_came_after_the_first_answer() -> None:
    assert contended.rate([10.0, 11.0, 12.0, 14.0]) == pytest.approx(3 * contended.IMAGES / 4)


def test_ratios_are_within_a_round() -> None:
    """A machine that is half as fast in one round changes no ratio."""
    fast = {"idle": 98.0, "spinning": 100.0, "busy": 49.0, "spinning_busy": 20.0, "slower": 44.1}
    rounds = [fast, {name: value / 2 for name, value in fast.items()}, fast]
    row = contended.summary(rounds)
    assert {name: row[name] for name in ("idle", "busy", "two_servers", "of_spinning", "spinning_busy")} == {
        "idle": 98.0, "busy": 0.5, "two_servers": 0.45, "of_spinning": 0.98, "spinning_busy": 0.2,
    }  # fmt: skip


def test_every_server_is_asked_until_it_has_answered_often_enough() -> None:
    asked = [0, 0]

    def call(server: int) -> None:
        asked[server] += 1

    rates = contended.rates_of([lambda: call(0), lambda: call(1)], 0.0)
    assert min(asked) >= contended.ANSWERS
    assert min(rates) > 0


def test_an_error_of_a_request_ends_the_leg() -> None:
    def fails() -> None:
        raise OSError("no server")

    with pytest.raises(OSError, match="no server"):
        contended.rates_of([fails], 60.0)


def test_the_busy_process_ends_with_its_block() -> None:
    before = set(psutil.Process().children())
    with contended.busy_process():
        (busy,) = set(psutil.Process().children()) - before
    assert not busy.is_running()
