"""Runners that never come to run."""

import os
import signal
from typing import NoReturn

from dinov3_server.config import Settings
from dinov3_server.errors import CheckpointError


def bad_weights(settings: Settings, device: str) -> NoReturn:
    raise CheckpointError("scripted: no such key")


def dies(settings: Settings, device: str) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
