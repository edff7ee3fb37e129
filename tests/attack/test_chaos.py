"""`make chaos`: every caller detects wrong rows, lost answers and forbidden statuses."""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from attack import chaos, jobs
from attack.outcomes import Outcomes
from attack.questions import Answer, Question, differs, draw, passing
from attack.traffic import Traffic
from dinov3_client import Client
from dinov3_client.testing import Failure, FakeServer
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.support.waiting import LIMIT, until

QUICK = chaos.Rhythm(worker_kill=1.0, frontend_kill=1.5, stop=0.7, longest_stop=0.2)
FLAGS = ("--weights", "random:0", "--arena-bytes", "16MiB", "--frontends", "2")


def answer(failed: dict[int, int] | None = None, **rows: list[float]) -> Answer:
    return Answer(
        {name: np.array([[v, 1.0] for v in values], np.float32) for name, values in rows.items()}, failed or {}
    )


def test_wrong_answers_are_detected() -> None:
    truth = answer(cls=[1, 2, 3], patches=[4, 5, 6])
    assert differs(truth, answer(cls=[1, 2, 3], patches=[4, 5, 6.00003])) is None
    assert differs(truth, answer(cls=[1, 2, 3], patches=[4, 5, 6.0003])) == "patches of row 2 is off by 4.9e-05"
    for wrong in (
        answer(cls=[1, 3, 2], patches=[4, 5, 6]),
        answer(cls=[1, 2, 3], patches=[4, float("nan"), 6]),
        answer(cls=[1, 2], patches=[4, 5]),
        answer(cls=[1, 2, 3]),
        answer({1: 3}, cls=[1, 0, 3], patches=[4, 0, 6]),
        answer({1: 13}, cls=[1, 0, 3], patches=[4, 0, 6]),
    ):
        assert differs(truth, wrong)


def test_an_image_without_room_is_not_wrong_and_the_others_are_still_compared() -> None:
    truth = answer({2: 3}, cls=[1, 2, 0])
    assert differs(truth, answer({1: 8, 2: 14}, cls=[1, 0, 0])) is None
    assert passing(truth, answer({1: 8, 2: 14}, cls=[1, 0, 0])) == {1, 2}
    assert differs(truth, answer({1: 8, 2: 3}, cls=[2, 0, 0]))
    assert differs(truth, answer(cls=[1, 2, 0]))  # the damaged one has features


def test_a_seed_gives_the_same_questions() -> None:
    first, again = ([draw(random.Random(seed)).request() for seed in range(20)] for _ in range(2))
    assert first == again
    assert draw(random.Random(20)).request() not in first


def test_outcomes_are_counted() -> None:
    outcomes = Outcomes()
    outcomes.add("a", "answered", count=3)
    outcomes.add("a", "refused", "UNAVAILABLE: in 3.5 s; at 127.0.0.1")
    outcomes.add("b", "lost", "why")
    assert outcomes.rows()[-1] == dict(zip(("caller", *chaos.COLUMNS[1:]), ("all", 5, 3, 1, 0, 0, 1), strict=True))
    assert outcomes.reasons == {"UNAVAILABLE: in N s": 1}
    assert outcomes.notes["lost"] == ["b: why"]


Caller = Callable[[Traffic, Client], None]
CALLERS: dict[str, Caller] = {
    "client": lambda traffic, client: traffic.blocking(random.Random(0), client),
    "async client": lambda traffic, client: traffic.awaiting(random.Random(0), 2),
    "raw": lambda traffic, client: traffic.raw(random.Random(0)),
    "deadlines": lambda traffic, client: traffic.impatient(random.Random(0)),
    "stream": lambda traffic, client: traffic.streaming(random.Random(0)),
    "training": lambda traffic, client: jobs.train(
        traffic, random.Random(0), client, jobs.draw_crops(random.Random(0), client)
    ),
}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def noted(server: FakeServer, call: Caller, caller: str, outcome: str, disturb: Callable[[], object]) -> Outcomes:
    """Run a caller until it has recorded `outcome`, and return the outcomes; `disturb` is called after its first
    answer."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    question = Question(tuple(pictures), (32, 32), layers=(3,))
    with Client(server.target, deadline=LIMIT) as client:
        traffic = Traffic(server.target, [(question, question.ask(client))], Outcomes(), threading.Event())
        thread = threading.Thread(target=call, args=(traffic, client))
        thread.start()
        try:
            until(lambda: traffic.outcomes.count("answered", caller))
            disturb()
            until(lambda: traffic.outcomes.count(outcome, caller))
        finally:
            traffic.stop.set()
            thread.join(LIMIT)
    return traffic.outcomes


@pytest.mark.parametrize("caller", CALLERS)
def test_a_wrong_row_is_detected(server: FakeServer, caller: str) -> None:
    def swap(response: pb.ExtractResponse) -> None:
        tensor = response.blocks[0].cls
        half = len(tensor.data) // 2
        tensor.data = tensor.data[half:] + tensor.data[:half]

    outcomes = noted(server, CALLERS[caller], caller, "wrong", lambda: setattr(server, "edit", swap))
    assert "cls of row" in outcomes.notes["wrong"][0]
    assert not outcomes.count("lost")


@pytest.mark.parametrize("caller", CALLERS)
def test_a_forbidden_status_is_a_lost_answer(server: FakeServer, caller: str) -> None:
    failure = Failure(grpc.StatusCode.INTERNAL, "sorry")
    outcomes = noted(server, CALLERS[caller], caller, "lost", lambda: setattr(server, "script", [failure]))
    assert "sorry" in outcomes.notes["lost"][0]
    assert not outcomes.count("wrong")


@pytest.mark.parametrize("caller", ["raw", "deadlines", "stream"])
def test_a_refusal_is_not_lost(server: FakeServer, caller: str) -> None:
    failure = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after=0.01)
    outcomes = noted(server, CALLERS[caller], caller, "refused", lambda: setattr(server, "script", [failure]))
    assert not outcomes.count("lost")
    assert any("full" in reason for reason in outcomes.reasons)


def test_a_missing_answer_of_a_stream_that_ends_with_ok_is_lost() -> None:
    traffic = Traffic("", [], Outcomes(), threading.Event())
    work = {1: None, 2: None}
    traffic._again("stream", work, [1], float("inf"), grpc.StatusCode.UNAVAILABLE, "again")
    traffic._again("stream", work, [2], float("inf"), grpc.StatusCode.OK, "no answer")
    assert work == {1: None}
    assert (traffic.outcomes.count("refused"), traffic.outcomes.count("lost")) == (1, 1)


def test_cancelled_calls_are_neither_lost_nor_answered(server: FakeServer) -> None:
    server.delay = 0.2
    pictures = np.zeros((1, 32, 32, 3), np.uint8)
    question = Question(tuple(pictures), (32, 32))
    with Client(server.target) as client:
        traffic = Traffic(server.target, [(question, question.ask(client))], Outcomes(), threading.Event())
    thread = threading.Thread(target=traffic.cancelling, args=(random.Random(0),))
    thread.start()
    until(lambda: traffic.outcomes.count("left") > 2)
    traffic.stop.set()
    thread.join(LIMIT)
    assert {row["caller"]: row["lost"] + row["wrong"] for row in traffic.outcomes.rows()} == {"cancels": 0, "all": 0}


def test_a_bulk_run_is_judged_file_by_file(server: FakeServer, tmp_path: Path) -> None:
    traffic = Traffic(server.target, [], Outcomes(), threading.Event())
    with Client(server.target) as client:
        photos = jobs.draw_photos(random.Random(0), client, 100)
    assert len(photos.truth) == 99
    judge = jobs.judge_bulk

    def judged(traffic: Traffic, photos: jobs.Photos, out: Path, code: int, said: str) -> None:
        traffic.stop.set()
        judge(traffic, photos, out, code, said)
        name = next(iter(photos.truth))
        wrong = {**photos.truth, name: {"cls": photos.truth[name]["cls"] + 1}}
        judge(traffic, jobs.Photos(photos.files, wrong), out, code, said)
        judge(traffic, jobs.Photos({**photos.files, "more.jpg": b""}, photos.truth), out, code, said)
        judge(traffic, photos, out, 2, "usage")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "judge_bulk", judged)
        jobs.extract_in_bulk(traffic, photos)
    assert [traffic.outcomes.count(outcome) for outcome in ("answered", "wrong", "lost")] == [299, 1, 101]


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "QUESTIONS", 20)


def test_a_bulk_run_that_stops_is_started_again_and_then_lost(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic = Traffic(server.target, [], Outcomes(), threading.Event())
    with Client(server.target) as client:
        photos = jobs.draw_photos(random.Random(0), client, 5)
    judge = jobs.judge_bulk

    def judged(traffic: Traffic, *rest: Any) -> None:
        judge(traffic, *rest)
        if server.script:  # the first run has ended
            traffic.stop.set()
        server.script = [full] * 1000

    full = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after=200.0)
    server.script = [full]
    monkeypatch.setattr(jobs, "judge_bulk", judged)
    jobs.extract_in_bulk(traffic, photos)
    assert [traffic.outcomes.count(outcome) for outcome in ("answered", "refused", "lost")] == [5, 3, 5]
    assert traffic.outcomes.reasons == {"a run stopped: full": 3}
    assert "full" in traffic.outcomes.notes["lost"][0]


def test_a_bulk_run_that_does_not_reach_the_server_is_started_again(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic = Traffic(server.target, [], Outcomes(), threading.Event())
    with Client(server.target) as client:
        photos = jobs.draw_photos(random.Random(0), client, 100)
    unreachable = subprocess.CompletedProcess([], 1, "", "dinov3-client: no server answers\n")
    run, outcomes = subprocess.run, iter([unreachable, None])
    judge = jobs.judge_bulk

    def judged(traffic: Traffic, *rest: Any) -> None:
        traffic.stop.set()
        judge(traffic, *rest)

    monkeypatch.setattr(jobs, "judge_bulk", judged)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: next(outcomes) or run(*args, **options))
    jobs.extract_in_bulk(traffic, photos)
    assert [traffic.outcomes.count(outcome) for outcome in ("answered", "refused", "lost")] == [100, 1, 0]
    assert traffic.outcomes.reasons == {"a run stopped: no server answers": 1}


def test_a_bulk_run_is_lost_if_no_run_reaches_the_server(tmp_path: Path) -> None:
    traffic = Traffic("", [], Outcomes(), threading.Event())
    photos = jobs.Photos({"broken.jpg": b""}, {})
    jobs.judge_bulk(traffic, photos, tmp_path / "never-made", 1, "dinov3-client: no server answers\n")
    assert traffic.outcomes.count("lost") == 1
    assert "no server answers" in traffic.outcomes.notes["lost"][0]


def test_a_bulk_run_is_not_started_again_after_a_fault() -> None:
    end = "\ndinov3-client: stopped; x keeps what was answered, and the same command resumes from there\n"
    assert jobs.refusal(f"dinov3-client: 1 of 2\ndinov3-client: no worker is running{end}") == "no worker is running"
    assert jobs.refusal("dinov3-client: no server answers\n") == "no server answers"
    assert not jobs.refusal(f"dinov3-client: the server failed (error id 00, the server's log has the cause){end}")
    assert not jobs.refusal("Traceback (most recent call last):\nKeyError: 1\n")
    assert not jobs.refusal("")


@pytest.mark.usefixtures("few_questions")
def test_this_server_gives_right_answers_despite_kills_and_stops() -> None:
    result = chaos.chaos("tests.support.serve", FLAGS, 4.0, 0, QUICK, files=20)
    assert result.good, chaos.show(chaos.record(result))
    assert result.done["worker killed"] >= 2
    assert result.done["frontend killed"] >= 1
    assert result.done.total() >= 5
    patient = {*CALLERS, "slow reader", "bulk"} - {"deadlines"}
    assert {row["caller"] for row in result.outcomes.rows() if row["answered"]} >= patient


@pytest.mark.usefixtures("few_questions")
def test_wrong_rows_after_a_kill_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_FIRST_FILE", str(tmp_path / "first"))
    result = chaos.chaos("tests.attack.forgetful", FLAGS, 3.0, 0, QUICK, files=20)
    assert not result.good
    assert result.outcomes.count("wrong") > 5
    assert "WRONG: " in chaos.show(chaos.record(result))
