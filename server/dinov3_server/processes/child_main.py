"""The entry point of every child process: `python -m dinov3_server.processes.child_main ROLE FD SUPERVISOR_PID`.

A child is a fresh interpreter, not a fork. It inherits one descriptor, FD, its end of the control channel, and reads
its start message from standard input. It dies with its supervisor and ignores the signals that a terminal or a service
manager sends to the whole process group: the supervisor alone acts on them, so that Ctrl-C drains.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
from typing import Any, Literal

from dinov3_server.engine.channel import Channel
from dinov3_server.engine.messages import ExitReason, Prepared, Progress, StartFailed, StartProvisioner
from dinov3_server.errors import StartupError
from dinov3_server.log import configure
from dinov3_server.signals import die_with, leave_to_supervisor, unwinding

log = logging.getLogger(__name__)

Role = Literal["provisioner", "frontend", "worker"]
# The exit status after StartFailed, which has carried the reason.
START_FAILED = 2


def main() -> int:
    role: Any
    role, fd, supervisor = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with(supervisor)
    # The supervisor ends a provisioner by SIGTERM: its git would outlive a SIGKILL.
    leave_to_supervisor(but=[signal.SIGTERM] if role == "provisioner" else [])
    os.set_inheritable(fd, False)
    start: Any = pickle.load(sys.stdin.buffer)
    control = Channel(socket.socket(fileno=fd))
    name = role if role == "provisioner" else f"{role}-{start.index}"
    configure(start.settings.log_level, start.settings.log_format, name)
    try:
        # Imported per role: a frontend must not load the device's libraries, nor a worker gRPC.
        if role == "worker":
            from dinov3_server.engine import worker_main

            worker_main.serve(start, control)
        elif role == "provisioner":
            with unwinding():
                _provision(start, control)
        else:
            from dinov3_server.api import frontend

            frontend.serve(start, control)
    except StartupError as error:
        control.send(StartFailed(error))
        control.flush_within(1.0)
        return START_FAILED
    except Exception as error:
        log.critical("%s failed with an unexpected error", name, exc_info=True)
        control.send(ExitReason.of(error))
        control.flush_within(1.0)
        os._exit(1)  # a regular exit would wait for non-daemon threads, possibly for ever
    return 0


def _provision(start: StartProvisioner, control: Channel) -> None:
    """Provide everything that workers need, report it to the supervisor, and end."""
    from dinov3_server.provision.prepare import prepare

    def report(text: str) -> None:
        control.send(Progress(text))
        control.flush()

    control.send(Prepared(*prepare(start.settings, report)))
    control.flush_within(1.0)


if __name__ == "__main__":
    sys.exit(main())
