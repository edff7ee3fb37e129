"""Runners that never come to run."""

import os
import signal
from typing import NoReturn

from dinov3_server.errors import CheckpointError


def bad_weights(model: str, weights: str, **_: object) -> NoReturn:
    raise CheckpointError("scripted: no such key")


def dies(model: str, weights: str, **_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
