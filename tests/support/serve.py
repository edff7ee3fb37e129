"""`dinov3-server` with the numpy runner in place of a model: `python -m tests.support.serve serve --port 0 ...`."""

import sys

from dinov3_server.cli import main

RUNNER = "tests.support.numpy_runner:build"

if __name__ == "__main__":
    sys.exit(main(runner=RUNNER))
