"""Predict how long a request will take, from the tokens that wait before it. Pure: no clock, no threads.

The estimate follows the scheduler's order: interactive before bulk, callers in equal shares, a caller's shorter
requests before its longer ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from dinov3_server.engine.messages import Load
from dinov3_server.engine.pace import Pace
from dinov3_server.engine.shares import Caller

# How much longer than expected a wait may turn out; what a request computes itself is better known.
WAIT_MARGIN = 1.25
# The part of its remaining time that a request may spend in a batch with others that came after it.
BATCH_PART = 0.25
# With several workers a large request is spread over them in parts of this many images.
SPREAD_IMAGES = 32


class Demand(NamedTuple):
    """What a request asks of the server, before anything of it is decoded."""

    images: int
    nbytes: int  # of the arena
    tokens: int  # of all its images
    caller: Caller
    bulk: bool

    @property
    def kind(self) -> tuple[bool, int]:
        """Its class and its size in powers of two, by which the scheduler ranks a caller's requests."""
        return self.bulk, (self.images - 1).bit_length()


class Waiting:
    """The tokens of one frontend's requests that no device has started, by caller and kind."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[Caller, tuple[bool, int]], int] = {}  # by caller and kind; none of 0
        self.interactive = 0
        self.bulk = 0

    def add(self, demand: Demand, tokens: int) -> None:
        """Count `tokens` of `demand` that wait from now on, or, where negative, no longer."""
        key = demand.caller, demand.kind
        left = self._tokens[key] = self._tokens.get(key, 0) + tokens
        if not left:
            del self._tokens[key]
        if demand.bulk:
            self.bulk += tokens
        else:
            self.interactive += tokens

    def most_ahead(self, others: Load) -> int:
        """Return an upper bound of `ahead` that costs nothing."""
        return others.running + self.interactive + others.interactive + self.bulk + others.bulk

    def ahead(self, demand: Demand, others: Load, frontends: int) -> int:
        """Return the tokens that the devices compute before the last row of `demand`, its own not counted.

        By the time it has received d tokens, any other caller that wants them has received d too, but no more than it
        waits for. `others` is the load of `frontends` other frontends, whose callers are not known here: each counts as
        one.
        """
        mine = 0
        connections, groups = Counter[Caller](), Counter[str]()  # others' tokens that compete with this request
        for (caller, kind), tokens in self._tokens.items():
            if caller == demand.caller:
                mine += tokens if kind <= demand.kind else 0
            elif demand.bulk or not kind[0]:
                if caller.group == demand.caller.group:
                    connections[caller] += tokens
                else:
                    groups[caller.group] += tokens
        wanted = mine + demand.tokens
        wanted += sum(min(tokens, wanted) for tokens in connections.values())
        total = wanted + sum(min(tokens, wanted) for tokens in groups.values())
        total += min(others.interactive + (others.bulk if demand.bulk else 0), wanted * frontends)
        if not demand.bulk:
            # Every fourth batch goes by shares alone, and may be of bulk.
            total += min(self.bulk + others.bulk, total // 3)
        return total - demand.tokens + others.running


class Forecast(NamedTuple):
    """Seconds that a request will take.

    `back_in` is the time until a worker lives; `wait` that of the devices on what goes before it; `own` its own time on
    them; `batch` that of a full batch, which it may have to share with rows behind it.
    """

    back_in: float
    wait: float
    own: float
    batch: float

    def ends_within(self, seconds: float) -> bool:
        shared = min(self.batch, seconds * BATCH_PART) if self.wait else 0.0
        return self.back_in + self.wait * WAIT_MARGIN + shared + self.own <= seconds


def predict(demand: Demand, ahead: int, paces: Sequence[Pace], full_batch: int, back_in: float, now: float) -> Forecast:
    """Return the forecast for `demand` with `ahead` tokens before it, for devices of those `paces` (at least one).

    `full_batch` is the tokens of the fullest batch. Where nothing is ahead and the devices have been idle, nothing says
    how fast they are now: the forecast is then that it takes no time.
    """
    rate, known, trusted = 0.0, False, False  # rate: tokens a second of all devices
    for pace in paces:
        rate += 1 / pace.seconds_per_token
        known = known or pace.known
        trusted = trusted or pace.trusted(now)
    if not ahead and not trusted:
        return Forecast(back_in, 0.0, 0.0, 0.0)
    mean = len(paces) / rate
    own = demand.tokens * mean / min(len(paces), -(-demand.images // SPREAD_IMAGES)) if known else 0.0
    return Forecast(back_in, ahead / rate, own, full_batch * mean)
