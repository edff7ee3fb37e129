"""The command `dinov3-client`: one module per subcommand.

Exit codes: 0 success; 1 failure (of the command, or of some images, each named on stderr); 2 wrong usage; 130 Ctrl-C or
SIGTERM. `extract` has more: see `dinov3-client extract --help`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from dinov3_client._errors import Dinov3Error
from dinov3_client.cli import extract, fit_projection, info, merge, pca, similarity
from dinov3_client.cli.common import UsageError, describe, print_error, report_interrupt, server_flags
from dinov3_client.cli.interrupts import end_on_signals
from dinov3_serving.standard_streams import run


def main(argv: Sequence[str] | None = None) -> int:
    return run("dinov3-client", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    with end_on_signals(partial(args.report_interrupt, args)):
        try:
            command: Callable[[argparse.Namespace], int] = args.command
            return command(args)
        except UsageError as error:
            parser.error(str(error))
        except (Dinov3Error, OSError) as error:
            print_error(describe(error))
            return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinov3-client", description="DINOv3 features from a dinov3-serving server.")
    parser.set_defaults(report_interrupt=report_interrupt)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    server = server_flags()
    info.add(commands, server)
    extract.add(commands, server)
    merge.add(commands)
    pca.add(commands, server)
    similarity.add(commands, server)
    fit_projection.add(commands, server)
    return parser
