"""`dinov3-client`: a server's model, features of photos in files, pictures of features. A module a command.

Exit codes: 0 done, 1 failed (in whole or for some images, each named on stderr), 2 wrong usage.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from dinov3_client._errors import Dinov3Error
from dinov3_client.cli import extract, fit_projection, info, pca, similarity
from dinov3_client.cli.common import UsageError, complain, server_flags


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except UsageError as error:
        parser.error(str(error))
    except (Dinov3Error, OSError) as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


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
