"""Show the progress of a download or check: one updated line on a terminal, log lines elsewhere, and a callback."""

from __future__ import annotations

import logging
import shutil
import sys
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0
LINE_SHARE = 0.05  # of the total; a line is due when both have passed
WINDOW_SECONDS = 10  # the rate is measured over


class Progress:
    """The progress of `name`. Call `at` for every block: it is cheap. Use it in a `with` block.

    `on_progress` gets a short text ("34 % of 342 MB, 12 MB/s, 19 s left") at most once a second.
    """

    def __init__(self, name: str, on_progress: Callable[[str], None] | None, clock: Callable[[], float]) -> None:
        self._name = name
        self._on_progress = on_progress
        self._clock = clock
        self._terminal = sys.stderr.isatty()
        self._shown = False
        self.began = clock()
        self._lined, self._lined_bytes = self.began, 0  # at the last line in the log
        self._samples: deque[tuple[float, int]] = deque(maxlen=WINDOW_SECONDS + 1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def start(self, done: int, total: int | None, verb: str = "fetching") -> None:
        """Begin, or begin again, to count bytes: the rate is measured from here."""
        now = self._clock()
        self._samples.clear()
        self._samples.append((now, done))
        self._lined, self._lined_bytes = now, done
        of = f"{size(total)}" if total is not None else "a file of unknown size"
        self.say(f"resuming at {size(done)} of {of}" if done else f"{verb} {of}")

    def at(self, done: int, total: int | None) -> None:
        """Show, at most once a second, that `done` of `total` bytes are there."""
        now = self._clock()
        if now - self._samples[-1][0] < 1:
            return
        self._samples.append((now, done))
        text = self._text(now, done, total)
        if self._on_progress:
            self._on_progress(text)
        if self._terminal:
            columns = shutil.get_terminal_size().columns
            sys.stderr.write(f"\r{f'{self._name}: {text}'[: columns - 1]}\x1b[K")
            sys.stderr.flush()
            self._shown = True
        elif now - self._lined >= LINE_SECONDS and done - self._lined_bytes >= LINE_SHARE * (total or 0):
            self._lined, self._lined_bytes = now, done
            log.info("%s: %s", self._name, text)

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Log a line, and pass it to `on_progress`."""
        self._clear()
        log.log(level, "%s: %s", self._name, text)
        if self._on_progress:
            self._on_progress(text)

    def _text(self, now: float, done: int, total: int | None) -> str:
        then, had = self._samples[0]
        rate = (done - had) / (now - then) if now > then else 0.0
        if total is None:
            return f"{size(done)}, {size(rate)}/s"
        text = f"{100 * done // max(total, 1)} % of {size(total)}, {size(rate)}/s"
        return f"{text}, {duration((total - done) / rate)} left" if rate > 0 else text

    def _clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def size(nbytes: float) -> str:
    """Format bytes for people, in powers of 1000."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while nbytes >= 999.5 and power < len(units) - 1:
        nbytes /= 1000
        power += 1
    return f"{nbytes:.0f} {units[power]}" if nbytes >= 99.5 or power == 0 else f"{nbytes:.3g} {units[power]}"


def duration(seconds: float) -> str:
    """Format seconds for people."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
