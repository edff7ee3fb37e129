"""A server whose first worker is correct, and whose later ones have wrong features in every fifth row.

The first worker makes the file TEST_FIRST_FILE, which tells the others that they are not the first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3_server.cli import main
from dinov3_server.models.interface import PixelShape, Row
from tests.support.numpy_runner import NumpyRunner


class ForgetfulRunner(NumpyRunner):
    def __init__(self, device: str) -> None:
        super().__init__(device)
        first = Path(os.environ["TEST_FIRST_FILE"])
        self._wrong = first.exists()
        self._rows = 0
        first.touch()

    def _write(self, row: Row, shape: PixelShape, image: NDArray[np.uint8]) -> None:
        self._rows += 1
        super()._write(row, shape, 255 - image if self._wrong and self._rows % 5 == 0 else image)


def build(model: str, weights: str, *, device: str, **_: Any) -> ForgetfulRunner:
    return ForgetfulRunner(device)


if __name__ == "__main__":
    sys.exit(main(runner="tests.attack.forgetful:build"))
