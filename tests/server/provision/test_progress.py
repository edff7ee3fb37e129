"""Progress on terminals, in logs and for callbacks."""

from __future__ import annotations

import io
import logging

import pytest

from dinov3_server.provision.progress import Progress, duration, size

TOTAL = 342_000_000


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(progress: Progress, clock: Clock, seconds: int, rate: int, done: int = 0, total: int | None = TOTAL) -> int:
    """Let bytes arrive at `rate`, in ten blocks a second."""
    for _ in range(10 * seconds):
        clock.now = round(clock.now + 0.1, 1)
        done += rate // 10
        progress.at(done, total)
    return done


def test_log_lines(clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with Progress("model.pth", None, clock) as progress:
        progress.start(0, TOTAL)
        done = run(progress, clock, 25, 10_000_000)  # 5 % are 1.7 s, so every 10 s
        progress.start(done, TOTAL)
        run(progress, clock, 50, 1_000_000, done)  # 5 % are 17.1 s
    assert [record.getMessage() for record in caplog.records] == [
        "model.pth: fetching 342 MB",
        "model.pth: 29 % of 342 MB, 10 MB/s, 24 s left",
        "model.pth: 58 % of 342 MB, 10 MB/s, 14 s left",
        "model.pth: resuming at 250 MB of 342 MB",
        "model.pth: 78 % of 342 MB, 1 MB/s, 1 min 14 s left",
        "model.pth: 83 % of 342 MB, 1 MB/s, 56 s left",
    ]


def test_a_terminal_shows_one_line_that_is_updated_and_cleared(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    with Progress("a-model-with-a-long-name.pth", None, clock) as progress:
        progress.start(0, TOTAL)
        run(progress, clock, 20, 10_000_000)
    lines = terminal.getvalue().split("\r")[1:]
    assert "\n" not in terminal.getvalue()
    assert lines.pop() == "\x1b[K"
    assert 20 <= len(lines) <= 80
    assert {line.removesuffix("\x1b[K")[:39] for line in lines} == {line.removesuffix("\x1b[K") for line in lines}
    assert lines[-1].startswith("a-model-with-a-long-name.pth: 5")
    assert len(caplog.records) == 1  # the start


def test_reports_come_at_most_once_a_second(clock: Clock) -> None:
    reports: list[str] = []
    with Progress("model.pth", reports.append, clock) as progress:
        progress.start(0, TOTAL)
        run(progress, clock, 8, 12_000_000)
    assert reports[0] == "fetching 342 MB"
    assert len(reports) == 9
    assert reports[-1] == "28 % of 342 MB, 12 MB/s, 20 s left"


def test_the_rate_is_measured_over_ten_seconds(clock: Clock) -> None:
    reports: list[str] = []
    with Progress("model.pth", reports.append, clock) as progress:
        progress.start(0, TOTAL)
        done = run(progress, clock, 20, 10_000_000)
        done = run(progress, clock, 5, 2_000_000, done)
        assert "6 MB/s" in reports[-1]
        run(progress, clock, 6, 2_000_000, done)
        assert "2 MB/s" in reports[-1]


def test_an_unknown_size(clock: Clock) -> None:
    reports: list[str] = []
    with Progress("model.pth", reports.append, clock) as progress:
        progress.start(0, None)
        run(progress, clock, 3, 10_000_000, total=None)
    assert reports[-1] == "30 MB, 10 MB/s"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (12_345, "12.3 kB"), (342_123_456, "342 MB"),
        (999_600, "1 MB"), (26_864_172_000, "26.9 GB"), (5e12, "5 TB"), (5e15, "5000 TB"),
    ],
)  # fmt: skip
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (19.4, "19 s"), (59.6, "1 min 0 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
