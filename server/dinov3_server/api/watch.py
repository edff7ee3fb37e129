"""A frontend's look at itself, many times a second."""

from __future__ import annotations

import asyncio

from dinov3_server.api.budget import ByteBudget
from dinov3_server.api.connections import hang_up
from dinov3_server.metrics import Metrics

LOOK_SECONDS = 0.025
_LOOKS_A_SECOND = round(1 / LOOK_SECONDS)


class Watch:
    """Measures how late the event loop is, and ends what holds the budget up."""

    def __init__(self, budget: ByteBudget, metrics: Metrics) -> None:
        self._budget = budget
        self._metrics = metrics

    async def run(self) -> None:
        """Look until cancelled."""
        loop = asyncio.get_running_loop()
        looks = 0
        while True:
            due = loop.time() + LOOK_SECONDS
            await asyncio.sleep(LOOK_SECONDS)
            self._metrics.loop_lag_seconds.observe(max(0.0, loop.time() - due))
            looks += 1
            if looks % _LOOKS_A_SECOND == 0:
                peer = self._budget.slow_reader()
                if peer is not None:
                    hang_up(peer)
