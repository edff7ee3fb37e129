"""The command `dinov3-client`: one module per subcommand.

Exit codes: 0 success; 1 failure (of the command, or of some images, each named on stderr); 2 wrong usage; 130 Ctrl-C or
SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dinov3_client._errors import Dinov3Error
from dinov3_client.cli import extract, fit_projection, info, pca, similarity
from dinov3_client.cli.common import UsageError, print_error, server_flags


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        command: Callable[[argparse.Namespace], int] = args.command
        with _terminable():
            return command(args)
    except UsageError as error:
        parser.error(str(error))
    except (Dinov3Error, OSError) as error:
        print_error(str(error))
        return 1
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM, which job schedulers send before SIGKILL, end a command like Ctrl-C."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinov3-client", description="DINOv3 features from a dinov3-serving server.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    server = server_flags()
    info.add(commands, server)
    extract.add(commands, server)
    pca.add(commands, server)
    similarity.add(commands, server)
    fit_projection.add(commands, server)
    return parser
