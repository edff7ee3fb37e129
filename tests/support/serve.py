"""Run `dinov3-server` with the numpy runner instead of a model: `python -m tests.support.serve serve --port 0 ...`.

Environment: TEST_RUNNER is another runner, TEST_SILENT_SECONDS how long a child may be silent, TEST_LONG_PAUSE the
pause before a failed child is tried again, TEST_NOFILE the limit of descriptors of each process.
"""

import os
import resource
import sys

from dinov3_server.cli import main
from dinov3_server.processes import child, watchdog

RUNNER = "tests.support.numpy_runner:build"

if __name__ == "__main__":
    watchdog.SILENT_SECONDS = float(os.environ.get("TEST_SILENT_SECONDS", watchdog.SILENT_SECONDS))
    child.LONG_PAUSE = float(os.environ.get("TEST_LONG_PAUSE", child.LONG_PAUSE))
    if limit := int(os.environ.get("TEST_NOFILE", "0")):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    sys.exit(main(runner=os.environ.get("TEST_RUNNER", RUNNER)))
