"""The entry point of `dinov3-client`, outside of its package, whose import imports gRPC."""

from __future__ import annotations

import os

# gRPC reads it when it is imported. Otherwise it would log each failed handshake beside the command's own error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def main() -> int:
    """Run `dinov3_client.cli.main`."""
    from dinov3_client.cli import main as command

    return command()
