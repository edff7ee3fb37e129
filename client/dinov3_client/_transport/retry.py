"""When to retry a call. It does not wait itself, so that callers can block or await."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from dinov3_client._errors import Overloaded, StatusError, Unavailable

# Seconds. Without RetryInfo the pause doubles from the first to the longest; each is shortened at random by up to half,
# so that the callers of a restarted server do not arrive together.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
# A pause from RetryInfo is lengthened at random by up to this fraction, for the same reason.
HINT_JITTER = 0.2
# Seconds. A shorter attempt is not made: its error would be its own deadline and not what is wrong.
SHORTEST_ATTEMPT = 0.1


class Attempts:
    """The attempts of one call, which must end at `end` on the clock `now`.

    patient: wait for a server that starts: retry every few seconds until the end, whatever its RetryInfo says.
    """

    def __init__(
        self,
        end: float,
        now: Callable[[], float] = time.monotonic,
        rand: Callable[[], float] = random.random,
        *,
        patient: bool = False,
    ) -> None:
        self._end = end
        self._patient = patient
        self.allowed = end - now()
        """Seconds."""
        self._now = now
        self._rand = rand
        self._made = 0
        self._pauses = 0
        self._previous: StatusError | None = None

    def remaining(self) -> float:
        """Return the seconds until the deadline: the timeout of the next attempt."""
        return max(0.0, self._end - self._now())

    def pause_or_raise(self, error: StatusError, has_alternative: bool = False) -> float:
        """Return the seconds to wait after an attempt failed with `error`, or raise `error` if no other may follow.

        The pause is 0 if `has_alternative`: another target has not been tried yet.

        Extraction changes nothing on the server, so that every transient error is retried: no server reachable or
        ready, and a full queue (which has RetryInfo, unlike a message that is too large).
        """
        self._made += 1
        error.attempts = self._made
        error.previous = self._previous
        if not isinstance(error, Unavailable | Overloaded):
            raise error
        if has_alternative:
            pause = 0.0
        elif error.retry_after and not self._patient:
            pause = error.retry_after * (1 + HINT_JITTER * self._rand())
        else:
            pause = min(FIRST_PAUSE * 2 ** min(self._pauses, 10), LONGEST_PAUSE) * (1 - 0.5 * self._rand())
            self._pauses += 1
        if self._patient:
            pause = min(pause, self.remaining() / 2)
        # RetryInfo of a full queue is the expected wait. An attempt with less time than that would be refused while the
        # load lasts, and add to it. After a long pause one attempt costs little, and the load may have changed.
        overloaded = isinstance(error, Overloaded) and not has_alternative
        needed = min(error.retry_after or 0.0, LONGEST_PAUSE) if overloaded else 0.0
        if pause > self.remaining() - max(needed, SHORTEST_ATTEMPT):
            raise error
        error.previous = None  # keep one error, not a growing chain
        self._previous = error
        return pause
