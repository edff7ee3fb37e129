"""Predict how long a request will take, from the tokens that are queued before it.

The estimate follows the scheduler's order: interactive before bulk, callers in equal shares, a caller's shorter
requests before its longer ones. Pure: without clock and threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from dinov3_server.engine.messages import Load
from dinov3_server.engine.pace import Pace
from dinov3_server.engine.shares import Caller

# How much longer than predicted a wait may turn out. A request's own computing time is known better.
WAIT_MARGIN = 1.25
# The fraction of its remaining time that a request may spend in a batch with rows that came after it.
BATCH_FRACTION = 0.25
# With several workers a large request is split into jobs of this many images.
SPREAD_IMAGES = 32


class Demand(NamedTuple):
    """The resources that a request needs, known before anything of it is decoded."""

    images: int
    nbytes: int  # in the arena
    tokens: int  # of all images
    caller: Caller
    bulk: bool

    @property
    def urgency(self) -> tuple[bool, int]:
        """The scheduler's rank among the requests of a caller, lowest first: bulk, then the size in powers of two."""
        return self.bulk, (self.images - 1).bit_length()


class QueuedTokens:
    """The tokens of one frontend's requests that no device has started yet."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[Caller, tuple[bool, int]], int] = {}  # by caller and urgency, without zeros
        self.interactive = 0
        self.bulk = 0

    def add(self, demand: Demand, tokens: int) -> None:
        """Count `tokens` of `demand` as queued; if negative, as not queued any more."""
        key = demand.caller, demand.urgency
        left = self._tokens[key] = self._tokens.get(key, 0) + tokens
        if not left:
            del self._tokens[key]
        if demand.bulk:
            self.bulk += tokens
        else:
            self.interactive += tokens

    def most_ahead(self, others: Load) -> int:
        """Return an upper bound of `ahead`, at almost no cost."""
        return others.running + self.interactive + others.interactive + self.bulk + others.bulk

    def ahead(self, demand: Demand, others: Load, frontends: int) -> int:
        """Return the tokens that the devices compute before the last row of `demand`, without its own.

        Callers get equal shares: while this one gets d tokens, each other one gets d too, or fewer if it has fewer
        queued. `others` is the load of `frontends` other frontends. Their callers are not known here: each frontend
        counts as one caller.
        """
        mine = 0
        connections, groups = Counter[Caller](), Counter[str]()  # tokens that compete with this request
        for (caller, urgency), tokens in self._tokens.items():
            if caller == demand.caller:
                mine += tokens if urgency <= demand.urgency else 0
            elif demand.bulk or not urgency[0]:
                if caller.group == demand.caller.group:
                    connections[caller] += tokens
                else:
                    groups[caller.group] += tokens
        wanted = mine + demand.tokens
        wanted += sum(min(tokens, wanted) for tokens in connections.values())
        total = wanted + sum(min(tokens, wanted) for tokens in groups.values())
        total += min(others.interactive + (others.bulk if demand.bulk else 0), wanted * frontends)
        if not demand.bulk:
            # Every fourth batch goes by shares alone, so it may hold bulk rows.
            total += min(self.bulk + others.bulk, total // 3)
        return total - demand.tokens + others.running


class Forecast(NamedTuple):
    """The predicted time of a request, in seconds."""

    restart: float  # until a worker is ready
    wait: float  # of the devices for the tokens before it
    own: float  # of the devices for its own tokens
    batch: float  # of a full batch, which it may have to share with rows that came after it

    def ends_within(self, seconds: float) -> bool:
        """Return whether the request ends in time, with a margin."""
        shared = min(self.batch, seconds * BATCH_FRACTION) if self.wait else 0.0
        return self.restart + self.wait * WAIT_MARGIN + shared + self.own <= seconds


def predict(demand: Demand, ahead: int, paces: Sequence[Pace], full_batch: int, restart: float, now: float) -> Forecast:
    """Return the forecast for `demand` with `ahead` tokens before it, on devices of these `paces` (at least one).

    `full_batch` is the tokens of a full batch. If nothing is ahead and the devices have been idle, their speed is not
    known, and the forecast is that the request takes no time.
    """
    rate, known, trusted = 0.0, False, False  # rate: tokens per second of all devices
    for pace in paces:
        rate += 1 / pace.seconds_per_token
        known = known or pace.known
        trusted = trusted or pace.trusted(now)
    if not ahead and not trusted:
        return Forecast(restart, 0.0, 0.0, 0.0)
    mean = len(paces) / rate
    own = demand.tokens * mean / min(len(paces), -(-demand.images // SPREAD_IMAGES)) if known else 0.0
    return Forecast(restart, ahead / rate, own, full_batch * mean)
