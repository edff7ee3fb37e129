"""The process that a person starts: spawns provisioner, frontends and workers, restarts them, and ends them.

It loads no model, fetches nothing and speaks no gRPC. Workers start once the provisioner has found or fetched what they
need. Everything happens in one loop over the children's channels, their deaths (pidfd) and signals; only the HTTP
endpoints have threads of their own.

Restarts: a child that dies after it was ready is started again at once; after a start that failed, with a pause that
doubles from 0.5 to 30 seconds. A child whose start fails `worker_restart_limit` times in a row has failed: as long as
another does its work it is tried again every 30 seconds; where none is left, the server ends for the orchestrator to
see. Where the machine has no descriptor, process or memory for a child, that is tried again for ever: nothing here may
raise for want of them.
"""

from __future__ import annotations

import logging
import math
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

from dinov3_server.config.settings import Settings
from dinov3_server.engine.channel import ChannelClosed, pair
from dinov3_server.engine.messages import (
    SNAPSHOT_SECONDS,
    Connected,
    Drain,
    LastWords,
    MetricsSnapshot,
    NotConnected,
    Prepared,
    Progress,
    Reached,
    Ready,
    Reload,
    StartFailed,
    StartFrontend,
    StartProvisioner,
    StartWorker,
    WorkerGone,
)
from dinov3_server.metrics import Aggregate, Metrics
from dinov3_server.models.interface import ModelInfo, Provisioned
from dinov3_server.processes.child import STATES, Child, kill
from dinov3_server.processes.http_endpoints import HttpEndpoints
from dinov3_server.processes.process import START_FAILED, Start
from dinov3_server.processes.topology import (
    check_memory,
    choose_devices,
    choose_frontends,
    hold_port,
    show_address,
    warn_if_open,
)
from dinov3_server.signals import UNUSED, Signals

log = logging.getLogger(__name__)

# A child that is ready says something every SNAPSHOT_SECONDS. One that says nothing for this long is stuck where it
# cannot end itself (stopped, swapped out, deadlocked), and is killed.
SILENT_SECONDS = 30.0
# The supervisor's own loop turns every SNAPSHOT_SECONDS. After this long without a turn it is not healthy; and if the
# whole service was frozen, as by `docker pause`, its children are not to blame for their silence.
STUCK_SECONDS = 10.0
# Before another try where there was no descriptor for the channel of a frontend and a worker.
CONNECT_PAUSE = 1.0
# What frontends may take beyond the grace, and workers after them, before they are killed.
DRAIN_SLACK = 5.0
WORKER_SLACK = 2.0
# How long the provisioner may take to end its git and remove what is half done, before it is killed.
PROVISIONER_SLACK = 2.0


class Supervisor:
    """One server: `run` serves until a signal or a hopeless worker ends it, and returns the exit code."""

    def __init__(self, settings: Settings, runner: str) -> None:
        self._settings = settings
        self._runner = runner
        self._metrics = Metrics()
        self._aggregate = Aggregate()
        self._selector = selectors.DefaultSelector()
        self._signals = Signals()
        self._readiness = False, "starting"  # what /readyz says; the HTTP thread reads this and `_turned`
        self._announced = False
        self._drain_until: float | None = None
        self._workers_told = False  # to end: every frontend has
        self._code: int | None = None
        self._turned = time.monotonic()
        self._provisioner = Child("provisioner", 0)
        self._progress = "looking for the weights"
        self._provisioned: Provisioned | None = None
        self._workers: list[Child] = []
        self._frontends: list[Child] = []
        self._unconnected: dict[tuple[Child, Child], float] = {}  # a frontend and a worker: when to try again

    def run(self) -> int:
        settings = self._settings
        with self._signals.caught(), hold_port(settings.host, settings.port) as port:
            self._port = port
            self._choose_children()
            http = HttpEndpoints(
                settings.http_host,
                settings.http_port,
                render=self._render,
                ready=lambda: self._readiness,
                healthy=self._health,
            )
            http.start()
            self._http_address = show_address(settings.http_host, http.port)
            self._selector.register(self._signals.reader, selectors.EVENT_READ, self._signals.clear)
            try:
                log.info(
                    "gRPC on %s, metrics and probes on http://%s", show_address(settings.host, port), self._http_address
                )
                warn_if_open(settings)
                for child in (self._provisioner, *self._frontends):  # workers once everything is there
                    self._start(child)
                self._turned = time.monotonic()
                while self._code is None:
                    self._turn()
                return self._code
            finally:
                self._kill_all()
                http.stop()
                self._selector.close()

    def _choose_children(self) -> None:
        settings = self._settings
        self._workers = [Child("worker", i, device) for i, device in enumerate(choose_devices(settings.devices))]
        count = choose_frontends(settings.frontends, self._workers[0].device)
        self._frontends = [Child("frontend", i) for i in range(count)]
        check_memory(count, settings.arena_bytes)

    @property
    def _children(self) -> list[Child]:
        return [self._provisioner, *self._workers, *self._frontends]

    # --- the loop --------------------------------------------------------------------------------

    def _turn(self) -> None:
        moments = [child.restart_at for child in self._children if child.restart_at is not None]
        if self._drain_until is not None:
            moments.append(self._drain_until)
        next_turn = min(moments, default=math.inf) - time.monotonic()
        for key, _ in self._selector.select(max(0.0, min(next_turn, SNAPSHOT_SECONDS))):
            key.data()
        while self._signals.received:
            self._on_signal(self._signals.received.pop(0))
        now = time.monotonic()
        for child in self._children:
            if child.restart_at is not None and child.restart_at <= now:
                self._start(child)
            if child.channel is not None:
                child.channel.flush()  # what it did not take at once
        for (frontend, worker), at in tuple(self._unconnected.items()):
            if at <= now:
                self._connect(frontend, worker)
        self._kill_the_silent(now)
        self._update_readiness()
        if self._drain_until is not None:
            self._go_on_draining(now)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if number in UNUSED:
            log.info("%s means nothing to this server", name)
            return
        if number == signal.SIGHUP:
            log.info("SIGHUP: the files of tokens and TLS are read again; other settings need a restart")
            for child in self._frontends:
                self._tell(child, Reload())
            return
        if self._drain_until is not None:
            log.warning("%s again: ending at once", name)
            self._code = 128 + number
            return
        grace = self._settings.drain_seconds
        log.info("%s: draining, up to %g s; a second signal ends at once", name, grace)
        self._drain_until = time.monotonic() + grace + DRAIN_SLACK
        self._end_provisioner()
        for child in self._frontends:
            self._end(child, Drain(grace))

    def _go_on_draining(self, now: float) -> None:
        assert self._drain_until is not None
        if any(child.process for child in self._frontends):
            if now >= self._drain_until:
                log.error("a frontend did not end in time; it is killed with what it still held")
                self._code = 1
        elif not any(child.process for child in self._workers):
            log.info("drained")
            self._code = 0
        elif not self._workers_told:
            self._workers_told = True
            self._drain_until = now + WORKER_SLACK
            for child in self._workers:
                self._end(child, Drain(0.0))
        elif now >= self._drain_until:
            log.warning("a worker is still busy with what nobody waits for any more; it is killed")
            self._code = 0

    def _kill_the_silent(self, now: float) -> None:
        turned, self._turned = self._turned, now
        for child in self._children:
            if now - turned > STUCK_SECONDS:
                child.heard = now
            if child.process is not None and child.ready and now - child.heard > SILENT_SECONDS:
                log.error("%s has said nothing for %.0f s, it is stuck; it is killed", child.name, now - child.heard)
                child.heard = now
                child.process.kill()

    # --- children --------------------------------------------------------------------------------

    def _start(self, child: Child) -> None:
        settings = self._settings
        start: Start
        if child.role == "provisioner":
            start = StartProvisioner(settings)
        elif child.role == "worker":
            assert self._provisioned is not None
            start = StartWorker(settings, child.index, child.device, self._runner, self._provisioned)
        else:
            start = StartFrontend(settings, child.index, len(self._frontends), settings.host, self._port)
        now = time.monotonic()
        try:
            child.spawn(start, self._selector, on_message=self._read, on_death=self._reap)
        except OSError as error:
            pause = child.not_spawned(error)
            child.restart_at = now + pause
            log.error("%s: %s; tried again in %g s", child.name, child.why, pause)
            self._tell_expectation(child, pause)
            return
        if child.role == "frontend":
            for worker in self._workers:
                if worker.ready:
                    self._connect(child, worker)

    def _read(self, child: Child) -> None:
        if child.channel is None:
            return  # reaped in this turn
        child.heard = time.monotonic()
        try:
            for message, _ in child.channel.receive():
                match message:
                    case Ready(info):
                        self._on_ready(child, info)
                    case MetricsSnapshot(snapshot):
                        self._aggregate.update(child.name, snapshot)
                    case StartFailed(complaint):
                        child.complaint = complaint
                    case LastWords(why):
                        child.last_words = why
                    case Reached(step):
                        child.reached = step
                    case NotConnected(index):
                        self._unconnected[child, self._workers[index]] = child.heard + CONNECT_PAUSE
                    case Progress(text):
                        self._progress = text
                    case Prepared(provisioned, seconds):
                        self._on_prepared(provisioned, seconds)
        except ChannelClosed:
            child.hang_up(self._selector)  # its death comes by the pidfd

    def _on_prepared(self, provisioned: Provisioned, seconds: dict[str, float]) -> None:
        self._provisioned = provisioned
        for step, of_step in seconds.items():
            self._metrics.model_load_seconds.set(of_step, step)
        if self._drain_until is None:
            for worker in self._workers:
                self._start(worker)

    def _on_ready(self, child: Child, info: ModelInfo | None) -> None:
        now = time.monotonic()
        child.ready = True
        child.load_seconds, child.since = now - child.since, now
        if info is None:
            log.info("%s serves after %.1f s", child.name, child.load_seconds)
            return
        log.info(
            "%s serves after %.1f s: %s on %s in %s, weights %s, fingerprint %s",
            child.name, child.load_seconds, info.name, info.device, info.dtype, info.weights, info.fingerprint,
        )  # fmt: skip
        for frontend in self._frontends:
            self._connect(frontend, child)

    def _connect(self, frontend: Child, worker: Child) -> None:
        """A channel of their own for a frontend and a worker that is ready. Where no descriptor is left for it, it is
        tried again later."""
        if frontend.channel is None or worker.channel is None or not worker.ready:
            self._unconnected.pop((frontend, worker), None)  # the successor will be connected
            return
        try:
            ours, theirs = pair()
            with ours, theirs:
                # First to the worker: one that is hung up on by a frontend forgets it.
                worker.channel.send(Connected(frontend.index), [theirs.fileno()])
                frontend.channel.send(Connected(worker.index), [ours.fileno()])
        except OSError as error:
            if (frontend, worker) not in self._unconnected:
                log.error("%s and %s cannot be connected yet: %s", frontend.name, worker.name, error.strerror)
            self._unconnected[frontend, worker] = time.monotonic() + CONNECT_PAUSE
            return
        self._unconnected.pop((frontend, worker), None)
        frontend.channel.flush_within(1.0)
        worker.channel.flush_within(1.0)

    def _reap(self, child: Child) -> None:
        assert child.process is not None
        self._read(child)  # its last words
        code = child.clear(self._selector)
        self._aggregate.retire(child.name)
        self._unconnected = {pair: at for pair, at in self._unconnected.items() if child not in pair}
        now = time.monotonic()
        pause = child.ended(code, now, self._settings.worker_restart_limit)
        is_over = self._workers_told if child.role == "worker" else self._drain_until is not None
        if not is_over and (child.role != "provisioner" or self._provisioned is None):
            self._restart(child, code, now, pause)
        self._tell_expectation(child, pause)

    def _restart(self, child: Child, code: int, now: float, pause: float) -> None:
        """Plan a child's successor, or give up."""
        if child.complaint and code == START_FAILED and not self._announced:
            raise child.complaint  # a person must mend it; trying again would hide the message
        if self._has_failed(child):
            failure = f"{child.place} failed to start {child.failed_starts} times in a row ({child.why})"
            if all(self._has_failed(other) for other in self._children if other.role == child.role):
                log.critical("%s; no %s is left, giving up", failure, child.role)
                self._code = 1
                return
            log.error("%s; it is tried again in %g s, the others serve on", failure, pause)
        else:
            log.error("%s died (%s); its successor starts in %g s", child.name, child.why, pause)
        child.restart_at = now + pause
        if child.role == "worker":
            self._metrics.worker_restarts.inc(child.device)

    def _has_failed(self, child: Child) -> bool:
        return child.has_failed(self._settings.worker_restart_limit)

    def _tell_expectation(self, child: Child, pause: float) -> None:
        """Tell frontends that there is no process of `child` now, and when there will be one that is ready."""
        if child.role == "worker":
            for frontend in self._frontends:
                self._tell(frontend, WorkerGone(child.index, pause + child.load_seconds))

    def _tell(self, child: Child, message: object) -> None:
        if child.channel is not None:
            child.channel.send(message)
            child.channel.flush_within(1.0)

    def _end(self, child: Child, drain: Drain) -> None:
        """Have it end; one that is not ready yet has nothing to finish, and would not listen for long."""
        child.restart_at = None
        if child.ready:
            self._tell(child, drain)
        elif child.process is not None:
            child.process.kill()

    def _end_provisioner(self) -> subprocess.Popen[bytes] | None:
        """Have it stop what it does and clear it away; its process, if there is one still."""
        self._provisioner.restart_at = None
        if self._provisioner.process is not None:
            self._provisioner.process.terminate()
        return self._provisioner.process

    def _kill_all(self) -> None:
        if (provisioner := self._end_provisioner()) is not None:
            with suppress(subprocess.TimeoutExpired):
                provisioner.wait(PROVISIONER_SLACK)
        kill(self._children)

    # --- what the outside sees -------------------------------------------------------------------

    def _update_readiness(self) -> None:
        if self._drain_until is not None:
            reason = "draining"
        elif self._provisioned is None:
            reason = f"provisioning: {self._progress}"
        elif not any(worker.ready for worker in self._workers):
            reason = "no worker is ready" if self._announced else "the model is still being loaded"
        elif not any(frontend.ready for frontend in self._frontends):
            reason = "no frontend is ready"
        else:
            reason = ""
        missing = [child for child in self._children if self._has_failed(child) or child.failed_spawns]
        self._readiness = (
            not reason,
            "; ".join([reason or "serving", *(f"{child.place} is down: {child.why}" for child in missing)]),
        )
        settled = all(child.ready or self._has_failed(child) for child in (*self._workers, *self._frontends))
        if settled and not reason and not self._announced:
            self._announced = True
            grpc_address = show_address(self._settings.host, self._port)
            # The one line on stdout: whoever started this process waits for it.
            sys.stdout.write(f"ready grpc={grpc_address} http={self._http_address}\n")
            sys.stdout.flush()

    def _health(self) -> tuple[bool, str]:
        late = time.monotonic() - self._turned
        return late <= STUCK_SECONDS, f"the supervisor's loop turned {late:.0f} s ago"

    def _render(self) -> bytes:
        counts = Counter((worker.device, worker.state(self._settings.worker_restart_limit)) for worker in self._workers)
        for device in {worker.device for worker in self._workers}:
            for state in STATES:
                self._metrics.workers.set(counts[device, state], device, state)
        self._aggregate.update("supervisor", self._metrics.snapshot())
        return self._aggregate.render()


def run(settings: Settings, runner: str) -> int:
    """Serve until a signal ends it, and return the exit code.

    `runner` is "module:function", which makes each worker's Runner; `backbone.runner.build` says how it is called.

    Raises:
        StartupError: something that a person must mend: a port in use, weights that cannot be read.
    """
    return Supervisor(settings, runner).run()
