"""Send messages to the frontends of a worker: announcements, results and load reports."""

from __future__ import annotations

from collections import defaultdict

from dinov3_server.engine.device import RunningBatch
from dinov3_server.engine.frontend_connection import FrontendConnection
from dinov3_server.engine.messages import JobResult, JobRows, LoadReport, Results, Started, total_load
from dinov3_server.engine.pace import BatchTime
from dinov3_server.engine.scheduler import BatchRow, JobKey

# How often a frontend that has no results to receive is sent the load of the others, in seconds.
LOAD_SECONDS = 0.02


class Frontends:
    """The connected frontends, `by_key`. `last_batch` is the last batch that the device ran."""

    def __init__(self) -> None:
        self.by_key: dict[int, FrontendConnection] = {}
        self.last_batch: BatchTime | None = None

    def announce(self, rows: list[BatchRow]) -> None:
        """Announce rows before the device receives them: if this process dies then, they may be the cause."""
        by_frontend: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            by_frontend[row.job.key[0]][row.job.key[1]].append(row.row)
        for key, jobs in by_frontend.items():
            channel = self.by_key[key].channel
            channel.send(Started(tuple(JobRows(job, tuple(indices)) for job, indices in jobs.items())))
            # Without waiting: a frontend that does not read must not delay the others. If this batch kills the process
            # before the message is out, its rows count as queued, which costs one more crash.
            channel.flush()

    def answer(self, batch: RunningBatch, failed: dict[int, str], now: float) -> None:
        """Send the results of a batch. `failed` maps positions in the batch to errors."""
        by_job: dict[JobKey, list[int]] = defaultdict(list)
        for position, row in enumerate(batch.rows):
            by_job[row.job.key].append(position)
        results: dict[int, list[JobResult]] = defaultdict(list)
        for (key, index), positions in by_job.items():
            job = batch.rows[positions[0]].job
            results[key].append(
                JobResult(
                    job=index,
                    rows=tuple(batch.rows[p].row for p in positions),
                    failed={batch.rows[p].row: failed[p] for p in positions if p in failed},
                    queue_seconds=batch.launched_at - job.enqueued,
                    inference_seconds=now - batch.launched_at,
                    batch_images=len(batch.rows),
                )
            )
            self.by_key[key].answered(index, len(positions))
        for key, jobs in results.items():
            frontend = self.by_key[key]
            if not frontend.gone:
                frontend.channel.send(Results(tuple(jobs), *self._load_report(frontend, now)))

    def send_load(self, now: float, at_least_every: float = LOAD_SECONDS) -> None:
        """Send each frontend the load of the others, unless it was sent within the last `at_least_every` seconds.

        Frontends that do not read get none.
        """
        for frontend in self.by_key.values():
            connected = frontend.attached and not frontend.gone
            if connected and now - frontend.load_sent_at >= at_least_every and frontend.channel.flush():
                frontend.channel.send(self._load_report(frontend, now))

    def _load_report(self, frontend: FrontendConnection, now: float) -> LoadReport:
        """Return the load of the other frontends, and the last batch unless it has been sent.

        Each batch is sent once. If it were repeated, a frontend would trust the pace of an idle device for ever: after
        one slow batch it would refuse every request with a short deadline, and never learn that the device is fast.
        """
        frontend.load_sent_at = now
        batch = None if frontend.batch_sent is self.last_batch else self.last_batch
        frontend.batch_sent = self.last_batch
        return LoadReport(total_load(other.load for other in self.by_key.values() if other is not frontend), batch)
