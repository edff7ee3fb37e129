"""When to try a call again. Pure: whoever calls does the waiting, so that it can block or await."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from dinov3_client._errors import Overloaded, StatusError, Unavailable

# Seconds. Without a hint of the server the pause doubles from the first to the longest; each is shortened by up
# to half at random, so that the callers of a server that comes back do not arrive together.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
# The pause that a server asks for is kept, and lengthened by up to this part of it, for the same reason.
HINT_JITTER = 0.2
# An attempt with less time is not made: it would tell of its own end and not of what is wrong.
SHORTEST_ATTEMPT = 0.1


class Attempts:
    """The attempts of one call, which has to end at `end` on the clock `now`.

    A `patient` one waits for a server that starts: it asks every few seconds whatever that expects, and until the end.
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
        """Seconds until the deadline: the timeout of the next attempt."""
        return max(0.0, self._end - self._now())

    def pause(self, error: StatusError, elsewhere: bool = False) -> float:
        """Seconds to wait after an attempt that ended with `error`; raises it where no other attempt is due.

        0 where the next one goes `elsewhere`, to a server that was not asked yet.

        Extraction changes nothing on the server, so that whatever may pass by itself is tried again: no
        server there or ready, and a full queue (which its RetryInfo tells from a message that is too large).
        """
        self._made += 1
        error.attempts = self._made
        error.previous = self._previous
        if not isinstance(error, Unavailable | Overloaded):
            raise error
        if elsewhere:
            pause = 0.0
        elif error.retry_after and not self._patient:
            pause = error.retry_after * (1 + HINT_JITTER * self._rand())
        else:
            pause = min(FIRST_PAUSE * 2 ** min(self._pauses, 10), LONGEST_PAUSE) * (1 - 0.5 * self._rand())
            self._pauses += 1
        if self._patient:
            pause = min(pause, self.remaining() / 2)
        # A server that refuses tells its expected wait. An attempt with less time than that is refused again while the
        # load lasts, and only adds to it. After a long pause one is no burden, and the load may be another.
        overloaded = isinstance(error, Overloaded) and not elsewhere
        needed = min(error.retry_after or 0.0, LONGEST_PAUSE) if overloaded else 0.0
        if pause > self.remaining() - max(needed, SHORTEST_ATTEMPT):
            raise error
        error.previous = None  # a chain of every attempt would only grow
        self._previous = error
        return pause
