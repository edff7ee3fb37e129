"""`dinov3-server` with the numpy runner in place of a model: `python -m tests.support.serve serve --port 0 ...`.

TEST_RUNNER names another runner, TEST_SILENT_SECONDS how long a child may be silent.
"""

import os
import sys

from dinov3_server import supervisor
from dinov3_server.cli import main

RUNNER = "tests.support.numpy_runner:build"

if __name__ == "__main__":
    supervisor.SILENT_SECONDS = float(os.environ.get("TEST_SILENT_SECONDS", supervisor.SILENT_SECONDS))
    sys.exit(main(runner=os.environ.get("TEST_RUNNER", RUNNER)))
