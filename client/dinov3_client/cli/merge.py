"""`dinov3-client merge`: make one extraction of the shards that several machines wrote."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from dinov3_client._errors import Dinov3Error
from dinov3_client.bulk.merging import merge
from dinov3_client.cli.extract import (
    EXIT_CODES,
    ProgressLine,
    add_allow_failed_flag,
    report_error,
    report_interrupt_and_advise,
    report_totals,
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="merge the shards of an extraction on several machines",
        description="Writes the features of all shards of an extraction (`extract --shard I/N`) to DIR: the same\n"
        "files as those of a run without --shard. Run it again to resume.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", type=Path, metavar="SHARD", help="the --out of each shard, in any order")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder, made if missing")
    add_allow_failed_flag(parser)
    parser.set_defaults(command=_merge, report_interrupt=report_interrupt_and_advise)


def _merge(args: argparse.Namespace) -> int:
    progress = ProgressLine(sys.stderr, time.monotonic)
    try:
        totals = merge(args.shards, args.out, progress)
    except (Dinov3Error, OSError) as error:
        return report_error(error, args.out, progress)
    return report_totals(totals, args, progress)
