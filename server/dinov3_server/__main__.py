"""The entry point of `dinov3-server`: check that the server's packages are installed, then run the command.

A plain install has only the client's packages, but has this command, too.
"""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec

from dinov3_server.signals import unwinding
from dinov3_serving.standard_streams import run

# The import names of the packages that only the extra "server" installs.
NEEDED = ("grpc_health", "grpc_reflection", "huggingface_hub", "prometheus_client", "safetensors", "torch", "yaml")


def main() -> int:
    """Run `cli.main`; return 2 if the server's packages are not installed."""
    return run("dinov3-server", _main)


def _main() -> int:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"dinov3-server: the server is not installed, only its client: {', '.join(missing)} cannot be found. "
            "Install it with `pip install 'dinov3-serving[server]'`, in a checkout `pip install '.[server]'`\n"
        )
        return 2
    try:
        with unwinding():  # PID 1 would ignore a SIGTERM that arrives during the imports
            from dinov3_server import cli  # not earlier: it imports those packages

            return cli.main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
