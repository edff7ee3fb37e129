"""The command `dinov3-server` begins here: it looks whether the packages of the server are there at all.

A plain install is the client alone, and has this command without them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

# What the extra "server" adds to a plain install and is not there without it, by the names that are imported.
NEEDED = ("grpc_health", "grpc_reflection", "huggingface_hub", "prometheus_client", "torch", "yaml")


def main() -> int:
    """As `cli.main`, and also 2 where the server is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"dinov3-server: the server is not installed, only its client: {', '.join(missing)} cannot be found. "
            "Install it with `pip install 'dinov3-serving[server]'`, in a checkout `pip install '.[server]'`\n"
        )
        return 2
    from dinov3_server import cli  # Not before: it imports them.

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
