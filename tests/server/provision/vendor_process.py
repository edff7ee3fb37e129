"""A process that vendors and may be killed on its way: `python -m tests.server.provision.vendor_process JSON`.

JSON is a list of the arguments of `vendor`, and a number: before the step of that number the process kills itself.
Steps are what changes the disk and every start of a program. It prints how many steps it took.
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
