"""Child processes: how the supervisor starts them, and how they begin and end.

A child is a fresh interpreter, not a fork: it inherits one descriptor, its end of the control channel,
and reads how to start from its standard input. It dies with its supervisor, and leaves signals to it:
Ctrl-C in a terminal must drain, not cut every process off.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from typing import Any, Literal, NamedTuple

from dinov3_server.engine.channel import Channel, pair
from dinov3_server.engine.messages import (
    LastWords,
    Prepared,
    Progress,
    StartFailed,
    StartFrontend,
    StartProvisioner,
    StartWorker,
)
from dinov3_server.errors import StartupError
from dinov3_server.host import worker_environment
from dinov3_server.log import configure
from dinov3_server.signals import UNUSED, die_with, unwind_on_sigterm

log = logging.getLogger(__name__)

Role = Literal["provisioner", "frontend", "worker"]
Start = StartProvisioner | StartFrontend | StartWorker
# Exit status after StartFailed: the message has told the reason.
START_FAILED = 2


class Spawned(NamedTuple):
    """A child that was started; `pidfd` becomes readable when it has died."""

    process: subprocess.Popen[bytes]
    channel: Channel
    pidfd: int


def spawn(role: Role, start: Start) -> Spawned:
    """Start a child. Must be called on the main thread: PDEATHSIG is tied to the
    thread that spawned the child, and the main thread lives as long as the process.

    Raises:
        OSError: there are not enough descriptors, processes or memory. Nothing is left behind.
    """
    with ExitStack() as undo:
        ours, theirs = pair()
        undo.callback(ours.close)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "dinov3_server.processes.process", role, str(theirs.fileno()), str(os.getpid())],
                env=worker_environment(os.environ) if role == "worker" else None,
                stdin=subprocess.PIPE,
                stdout=sys.stderr,  # stdout is for the supervisor's one line
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        undo.callback(process.wait)
        undo.callback(process.kill)  # before the wait: the last is the first to be called
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin:  # if it is dead already, its pidfd says so
            pickle.dump(start, process.stdin)
        spawned = Spawned(process, Channel(ours), os.pidfd_open(process.pid))
        undo.pop_all()
        return spawned


def _tie_to(supervisor: int, role: Role) -> None:
    """Die when the supervisor does, and take no signals but from it."""
    die_with(supervisor)
    # `systemctl reload`, for one, sends SIGHUP to every process of a service.
    for number in (signal.SIGINT, signal.SIGHUP, *UNUSED):
        signal.signal(number, signal.SIG_IGN)
    if role == "provisioner":
        unwind_on_sigterm()  # how the supervisor ends it: its git would outlive a SIGKILL
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _provision(start: StartProvisioner, control: Channel) -> None:
    """The provisioner process: have everything that workers need, tell the supervisor, end."""
    from dinov3_server.provision.prepare import prepare

    def report(text: str) -> None:
        control.send(Progress(text))
        control.flush()

    control.send(Prepared(*prepare(start.settings, report)))
    control.flush_within(1.0)


def main() -> int:
    role: Any
    role, fd, supervisor = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _tie_to(supervisor, role)
    os.set_inheritable(fd, False)
    start: Any = pickle.load(sys.stdin.buffer)
    control = Channel(socket.socket(fileno=fd))
    name = role if role == "provisioner" else f"{role}-{start.index}"
    configure(start.settings.log_level, start.settings.log_format, name)
    try:
        # Each imports its own: a frontend must not load the device's libraries, nor a worker gRPC.
        if role == "worker":
            from dinov3_server.engine import worker

            worker.serve(start, control)
        elif role == "provisioner":
            _provision(start, control)
        else:
            from dinov3_server.api import frontend

            frontend.serve(start, control)
    except StartupError as error:
        control.send(StartFailed(error))
        control.flush_within(1.0)
        return START_FAILED
    except Exception as error:
        log.critical("%s ends by an error of ours", name, exc_info=True)
        control.send(LastWords.of(error))
        control.flush_within(1.0)
        os._exit(1)  # at once: an interpreter that shuts down would wait for threads, maybe for ever
    return 0


if __name__ == "__main__":
    sys.exit(main())
