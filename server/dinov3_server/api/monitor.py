"""Measure the event-loop lag and the memory of a frontend, many times a second, and act on both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from dinov3_server.api.budget import ByteBudget
from dinov3_server.api.peers import OpenCalls, close_connections
from dinov3_server.api.receiving import Receiver
from dinov3_server.malloc import Trimmer, anonymous_bytes
from dinov3_server.metrics import Metrics

CHECK_SECONDS = 0.025
_CHECKS_PER_SECOND = round(1 / CHECK_SECONDS)
# What a frontend may allocate for itself after its start: caches, small pictures that threads decode.
OWN_BYTES = 64 << 20


@dataclass(eq=False)
class FrontendMonitor:
    """Measures event-loop lag, ends reads when gRPC holds too much, closes connections with too many calls, and returns
    freed memory after a peak.

    `allocated` returns the bytes that malloc has given to this process. None if the process does more than serve, as
    in tests: then memory is not checked.
    """

    receiver: Receiver
    calls: OpenCalls
    budget: ByteBudget
    metrics: Metrics
    allocated: Callable[[], int] | None

    def __post_init__(self) -> None:
        self._own = self.allocated() if self.allocated else 0
        self._trimmer = Trimmer()
        self._most_allocated = 0

    async def run(self) -> None:
        """Check every CHECK_SECONDS until cancelled."""
        loop = asyncio.get_running_loop()
        checks = 0
        while True:
            due = loop.time() + CHECK_SECONDS
            await asyncio.sleep(CHECK_SECONDS)
            self.metrics.event_loop_lag_seconds.observe(max(0.0, loop.time() - due))
            checks += 1
            each_second = checks % _CHECKS_PER_SECOND == 0
            if self.allocated:
                self._check_memory(self.allocated, each_second)
            if each_second:
                peer = self.budget.slow_reader()
                if peer is not None:
                    close_connections([peer], "it did not read its answer while others waited for memory")
            if peers := self.calls.connections_to_close():
                close_connections(peers, "too many calls were open")

    def _check_memory(self, allocated: Callable[[], int], each_second: bool) -> None:
        held, own = anonymous_bytes(), self._own + OWN_BYTES + self.receiver.limit
        if held > own + self.budget.nbytes - self.budget.pictures.used:
            # Freed memory counts as much as used memory against a container's limit, which pictures share in processes
            # of their own.
            self._trimmer.trim()
        # `allocated` costs 40 us, and is never more than `held`.
        if each_second or held > own:
            now = allocated()
            self._most_allocated = max(self._most_allocated, now)
            counted = self.budget.messages.used + self.budget.answers.used
            self.receiver.end_slow_reads(now - counted - self._own - OWN_BYTES)
        if each_second:
            self._trimmer.look(self._most_allocated)
            self._most_allocated = 0
