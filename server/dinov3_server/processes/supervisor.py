"""The server's main process: it starts provisioner, frontends and workers, restarts them, and ends them.

It loads no model, fetches nothing and speaks no gRPC. Workers start once the provisioner has found or fetched what they
need. One event loop handles the children's channels, their deaths (pidfd) and signals; only the HTTP endpoints have
a thread of their own.

Restarts: a child that dies after it was ready is started again at once; after a failed start, with a pause that doubles
from 0.5 to 30 seconds. A child that fails to start `worker_restart_limit` times in a row has failed: while another of
its role serves it is tried again every 30 seconds; when none is left, the server exits, so that the orchestrator sees
it. If the machine has no descriptor, process or memory for a child, the start is tried again for ever: nothing in this
module may raise for lack of them.
"""

from __future__ import annotations

import logging
import math
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version

from dinov3_server import __version__
from dinov3_server.config.settings import Settings
from dinov3_server.engine.channel import ChannelClosed
from dinov3_server.engine.messages import (
    SNAPSHOT_SECONDS,
    Drain,
    ExitReason,
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
from dinov3_server.processes.child import STATES, Child, Start, kill
from dinov3_server.processes.child_main import START_FAILED
from dinov3_server.processes.connections import Connections
from dinov3_server.processes.http_endpoints import HttpEndpoints
from dinov3_server.processes.topology import (
    check_memory,
    choose_devices,
    choose_frontends,
    hold_port,
    show_address,
    warn_if_open,
)
from dinov3_server.processes.watchdog import Watchdog
from dinov3_server.signals import UNUSED, UNWIND_SECONDS, Signals

log = logging.getLogger(__name__)

# How much longer than the drain time frontends, and workers after them, may take before they are killed.
DRAIN_SLACK = 5.0
WORKER_SLACK = 2.0
# How long the provisioner may take to end its git and remove unfinished files, before it is killed.
PROVISIONER_SLACK = UNWIND_SECONDS + 1.0


class Supervisor:
    """One server.

    `runner` is the "module:function" that makes each worker's Runner; see `backbone.runner.build` for its arguments.
    """

    def __init__(self, settings: Settings, runner: str) -> None:
        self._settings = settings
        self._runner = runner
        self._metrics = Metrics()
        self._metrics.build_info.set(1, __version__, platform.python_version(), version("torch"))
        self._aggregate = Aggregate()
        self._selector = selectors.DefaultSelector()
        self._signals = Signals()
        self._readiness = False, "starting"  # for /readyz; the HTTP thread reads this
        self._announced = False
        self._drain_until: float | None = None
        self._workers_ending = False  # every frontend has ended
        self._code: int | None = None
        self._provisioner = Child("provisioner", 0)
        self._progress = "looking for the weights"
        self._provisioned: Provisioned | None = None
        self._workers: list[Child] = []
        self._frontends: list[Child] = []
        self._connections = Connections()

    def run(self) -> int:
        """Serve until a signal or the failure of all workers, and return the exit code.

        Raises:
            StartupError: the operator must fix something: a port in use, weights that cannot be read.
        """
        settings = self._settings
        with self._signals.caught(), hold_port(settings.host, settings.port) as port:
            self._port = port
            self._choose_children()
            self._watchdog = Watchdog()
            http = HttpEndpoints(
                settings.http_host,
                settings.http_port,
                render=self._render,
                ready=lambda: self._readiness,
                healthy=self._watchdog.health,
            )
            http.start()
            self._http_address = show_address(settings.http_host, http.port)
            self._selector.register(self._signals.reader, selectors.EVENT_READ, self._signals.clear)
            try:
                log.info(
                    "gRPC on %s, metrics and probes on http://%s", show_address(settings.host, port), self._http_address
                )
                warn_if_open(settings)
                for child in (self._provisioner, *self._frontends):  # workers wait for the provisioner
                    self._start(child)
                while self._code is None:
                    self._iterate()
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
        for worker in self._workers:
            self._metrics.worker_restarts.inc(worker.device, value=0)

    @property
    def _children(self) -> list[Child]:
        return [self._provisioner, *self._workers, *self._frontends]

    # --- the event loop --------------------------------------------------------------------------

    def _iterate(self) -> None:
        moments = [child.restart_at for child in self._children if child.restart_at is not None]
        if self._drain_until is not None:
            moments.append(self._drain_until)
        timeout = min(moments, default=math.inf) - time.monotonic()
        for key, _ in self._selector.select(max(0.0, min(timeout, SNAPSHOT_SECONDS))):
            key.data()
        while self._signals.received:
            self._on_signal(self._signals.received.pop(0))
        now = time.monotonic()
        for child in self._children:
            if child.restart_at is not None and child.restart_at <= now:
                self._start(child)
            if child.channel is not None:
                child.channel.flush()  # the part that the socket did not take at once
        self._connections.retry(now)
        self._watchdog.iterate(self._children, now)
        self._update_readiness()
        if self._drain_until is not None:
            self._continue_draining(now)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if number in UNUSED:
            log.info("%s is ignored: this server does not use it", name)
            return
        if number == signal.SIGHUP:
            log.info("SIGHUP: the files of tokens and TLS are read again; other settings need a restart")
            for child in self._frontends:
                self._send(child, Reload())
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

    def _continue_draining(self, now: float) -> None:
        assert self._drain_until is not None
        if any(child.process for child in self._frontends):
            if now >= self._drain_until:
                log.error("a frontend did not end in time; it is killed with the requests that it still held")
                self._code = 1
        elif not any(child.process for child in self._workers):
            log.info("drained")
            self._code = 0
        elif not self._workers_ending:
            self._workers_ending = True
            self._drain_until = now + WORKER_SLACK
            for child in self._workers:
                self._end(child, Drain(0.0))
        elif now >= self._drain_until:
            log.warning(
                "a worker did not end within %g s: it computes, or the machine is busy; it is killed", WORKER_SLACK
            )
            self._code = 0

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
            pause = child.on_spawn_failed(error)
            child.restart_at = now + pause
            log.error("%s: %s; tried again in %g s", child.name, child.reason, pause)
            self._report_gone(child, pause)
            return
        if child.role == "frontend":
            for worker in self._workers:
                if worker.ready:
                    self._connections.connect(child, worker)

    def _read(self, child: Child) -> None:
        if child.channel is None:
            return  # reaped in this iteration
        child.last_message = time.monotonic()
        try:
            for message, _ in child.channel.receive():
                match message:
                    case Ready(info):
                        self._on_ready(child, info)
                    case MetricsSnapshot(snapshot):
                        self._aggregate.update(child.name, snapshot)
                    case StartFailed(error):
                        child.start_error = error
                    case ExitReason(reason):
                        child.last_words = reason
                    case Reached(step):
                        child.reached = step
                    case NotConnected(index):
                        self._connections.retry_later(child, self._workers[index])
                    case Progress(text):
                        self._progress = text
                    case Prepared(provisioned, seconds):
                        self._on_prepared(provisioned, seconds)
        except ChannelClosed:
            child.close_channel(self._selector)  # the pidfd will report its death

    def _on_prepared(self, provisioned: Provisioned, seconds: dict[str, float]) -> None:
        self._provisioned = provisioned
        for step, duration in seconds.items():
            self._metrics.model_load_seconds.set(duration, step)
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
            self._connections.connect(frontend, child)

    def _reap(self, child: Child) -> None:
        assert child.process is not None
        self._read(child)  # messages that it sent before it died
        code = child.release(self._selector)
        self._aggregate.retire(child.name)
        self._connections.forget(child)
        now = time.monotonic()
        pause = child.on_exit(code, now, self._settings.worker_restart_limit)
        is_over = self._workers_ending if child.role == "worker" else self._drain_until is not None
        if not is_over and (child.role != "provisioner" or self._provisioned is None):
            self._restart(child, code, now, pause)
        self._report_gone(child, pause, killed=code == -signal.SIGKILL)

    def _restart(self, child: Child, code: int, now: float, pause: float) -> None:
        """Schedule a child's successor, or end the server."""
        if child.start_error and code == START_FAILED and not self._announced:
            raise child.start_error  # the operator must fix it; another try would hide the message
        if self._has_failed(child):
            failure = f"{child.place} failed to start {child.failed_starts} times in a row ({child.reason})"
            if all(self._has_failed(other) for other in self._children if other.role == child.role):
                log.critical("%s; no %s is left, giving up", failure, child.role)
                self._code = 1
                return
            log.error("%s; it is tried again in %g s, the others continue to serve", failure, pause)
        else:
            log.error("%s died (%s); its successor starts in %g s", child.name, child.reason, pause)
        child.restart_at = now + pause
        if child.role == "worker":
            self._metrics.worker_restarts.inc(child.device)

    def _has_failed(self, child: Child) -> bool:
        return child.has_failed(self._settings.worker_restart_limit)

    def _report_gone(self, child: Child, pause: float, killed: bool = False) -> None:
        """Report to frontends that a worker has no process now, and when its successor is expected to be ready."""
        if child.role == "worker":
            for frontend in self._frontends:
                self._send(frontend, WorkerGone(child.index, pause + child.load_seconds, killed))

    def _send(self, child: Child, message: object) -> None:
        if child.channel is not None:
            child.channel.send(message)
            child.channel.flush_within(1.0)

    def _end(self, child: Child, drain: Drain) -> None:
        """Drain a child, or kill it if it is not ready: it has nothing to finish, and would not listen for long."""
        child.restart_at = None
        if child.ready:
            self._send(child, drain)
        elif child.process is not None:
            child.process.kill()

    def _end_provisioner(self) -> subprocess.Popen[bytes] | None:
        """Ask the provisioner to stop and to remove unfinished files. Return its process, if it has one."""
        self._provisioner.restart_at = None
        if self._provisioner.process is not None:
            self._provisioner.process.terminate()
        return self._provisioner.process

    def _kill_all(self) -> None:
        if (provisioner := self._end_provisioner()) is not None:
            with suppress(subprocess.TimeoutExpired):
                provisioner.wait(PROVISIONER_SLACK)
        kill(self._children)

    # --- readiness, metrics ----------------------------------------------------------------------

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
        down = [child for child in self._children if self._has_failed(child) or child.failed_spawns]
        self._readiness = (
            not reason,
            "; ".join([reason or "serving", *(f"{child.place} is down: {child.reason}" for child in down)]),
        )
        settled = all(child.ready or self._has_failed(child) for child in (*self._workers, *self._frontends))
        if settled and not reason and not self._announced:
            self._announced = True
            grpc_address = show_address(self._settings.host, self._port)
            # The only line on stdout: the process that started this one may wait for it.
            sys.stdout.write(f"ready grpc={grpc_address} http={self._http_address}\n")
            sys.stdout.flush()

    def _render(self) -> bytes:
        counts = Counter((worker.device, worker.state(self._settings.worker_restart_limit)) for worker in self._workers)
        for device in {worker.device for worker in self._workers}:
            for state in STATES:
                self._metrics.workers.set(counts[device, state], device, state)
        self._aggregate.update("supervisor", self._metrics.snapshot())
        return self._aggregate.render()
