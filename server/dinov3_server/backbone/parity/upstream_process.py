"""Meta's features of the probes, computed by a process of its own that ends with them.

So what importing their code does to a process stays there, and its model's memory is given back whole before ours is
built. It reads what to do from its standard input, and its standard output is the features: should it or its starter be
killed, nothing is left behind.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dinov3_server.backbone.parity.reference_images import probes
from dinov3_server.backbone.parity.upstream import UpstreamModel, cut
from dinov3_server.backbone.runners.base import TORCH_DTYPES
from dinov3_server.backbone.weights.checkpoint import Checkpoint, load_checkpoint
from dinov3_server.errors import UpstreamCodeError
from dinov3_server.models.interface import FeatureDtype, Output, TokenKind
from dinov3_server.models.variant import DatasetName, Variant
from dinov3_server.signals import die_with

PROVEN: tuple[TokenKind, ...] = ("cls", "patches")

# Of each probe: [D] cls and [P, D] patches, fp32, on the CPU.
Features = list[dict[TokenKind, Tensor]]

# Of what the process said before it failed: the end of a traceback is what happened.
_LAST_LINES = 6


class NotRun(Exception):
    """Meta's code could not be run to its end: how it ended, and the last that it said."""


def upstream_features(
    checkout: Path,
    weights: Path,
    variant: Variant,
    dataset: DatasetName,
    dtypes: Sequence[FeatureDtype],
    *,
    device: torch.device,
    threads: int,
) -> dict[FeatureDtype, Features]:
    """Meta's features of the probes, computed in each of `dtypes`, from the same weights that ours are built from.

    To be called on the main thread: the process dies with the thread that starts it. Raises NotRun.
    """
    # A mapping proxy cannot be pickled.
    plain = replace(variant, hashes=dict(variant.hashes))
    done = subprocess.run(
        [sys.executable, "-m", "dinov3_server.backbone.parity.upstream_process", str(os.getpid())],
        input=pickle.dumps((checkout, weights, plain, dataset, tuple(dtypes), str(device), threads)),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise NotRun(_how_it_ended(done.returncode, done.stderr.decode(errors="replace")))
    features: dict[FeatureDtype, Features] = torch.load(io.BytesIO(done.stdout), weights_only=True)
    return features


def _how_it_ended(code: int, said: str) -> str:
    ended = f"exit status {code}"
    if code < 0:
        ended = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            ended += ", as the kernel does where memory runs out"
    return "\n    ".join([ended, *map(cut, said.rstrip().splitlines()[-_LAST_LINES:])])


def main() -> int:
    die_with(int(sys.argv[1]))
    # Whatever prints shall not print among the features.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        try:
            features = _compute(*pickle.load(sys.stdin.buffer))
        except UpstreamCodeError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        torch.save(features, out)
    return 0


def _compute(
    checkout: Path,
    weights: Path,
    variant: Variant,
    dataset: DatasetName,
    dtypes: Sequence[FeatureDtype],
    device: str,
    threads: int,
) -> dict[FeatureDtype, Features]:
    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(weights, variant, dataset)
    return {dtype: _features(checkout, checkpoint, dtype, torch.device(device)) for dtype in dtypes}


@torch.inference_mode()
def _features(checkout: Path, checkpoint: Checkpoint, dtype: FeatureDtype, device: torch.device) -> Features:
    model = UpstreamModel(checkout, checkpoint, dtype=TORCH_DTYPES[dtype], device=device)
    features: Features = []
    for image in probes():
        computed = model(torch.from_numpy(image)[None].to(device), [Output(kind) for kind in PROVEN])
        features.append({output.kind: tokens[0].cpu().clone() for output, tokens in computed.items()})
    return features


if __name__ == "__main__":
    sys.exit(main())
