"""`make integrations [EXAMPLES="NAME..."]`: run examples against one real server.

Each example has an environment of its own, installed on first use and kept. The server has the seeded default model of
`make demo`, ViT-S/16 with random weights. What examples print and write stays in build/integrations.
"""

from __future__ import annotations

import argparse
import shutil
import sys

from bench.server import serving
from tests.integrations.driver import exit_code, run_all, show
from tests.integrations.examples import EXAMPLES, Inputs
from tests.integrations.inputs import write_photos, write_shards
from tests.support.paths import ROOT

OUT = ROOT / "build" / "integrations"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.integrations", description="Run examples against a server.")
    names = [example.name for example in EXAMPLES]
    parser.add_argument("examples", nargs="*", metavar="EXAMPLE", default=[], help=f"{', '.join(names)} (default: all)")
    wanted = parser.parse_args().examples or names
    if unknown := set(wanted) - set(names):
        parser.error(f"unknown example: {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
    shutil.rmtree(OUT, ignore_errors=True)
    photos = write_photos(OUT / "inputs" / "photos")
    shards = write_shards(photos, OUT / "inputs" / "shards")
    with (
        (OUT / "server.log").open("wb") as log,
        serving("--weights", "random:0", "--parity-check", "false", log=log) as server,
    ):
        inputs = Inputs(server.grpc, photos, shards, OUT)
        outcomes = run_all([example for example in EXAMPLES if example.name in wanted], inputs)
    print("\n" + show(outcomes))
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
