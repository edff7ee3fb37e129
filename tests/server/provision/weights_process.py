"""Run `find_or_fetch` in a process of its own.

python -m tests.server.provision.weights_process CACHE_DIR WEIGHTS [OFFLINE]

It prints the path. Log lines go to stderr.
"""

import logging
import sys

from dinov3_server.config.settings import Settings
from dinov3_server.provision.weights import find_or_fetch
from tests.server.provision.weights_rig import variant

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    found = find_or_fetch(Settings(cache_dir=sys.argv[1], weights=sys.argv[2], offline=len(sys.argv) > 3), variant())
    assert "torch" not in sys.modules
    print(found.path, "huggingface_hub" in sys.modules)  # noqa: T201
