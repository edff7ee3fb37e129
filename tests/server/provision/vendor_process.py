"""Fetch Meta's code in a process that may kill itself: `python -m tests.server.provision.vendor_process JSON`.

JSON is a list of the arguments of `vendor` and the number of the step before which the process kills itself. Steps are
disk changes and starts of programs. It prints the number of steps.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from dinov3_server.provision.vendor import vendor

_STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "subprocess.Popen", "fcntl.flock"}


def main() -> None:
    url, revision, target, options, fatal = json.loads(sys.argv[1])
    steps = 0

    def count(event: str, _: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in _STEPS:
            if steps == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1

    sys.addaudithook(count)
    vendor(url, revision, Path(target), **options)
    sys.stdout.write(str(steps))


if __name__ == "__main__":
    main()
