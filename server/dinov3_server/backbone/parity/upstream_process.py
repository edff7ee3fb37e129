"""Computes features of the reference images with Meta's code, in a separate process.

So the side effects of importing that code stay there, and all memory of its model is freed before ours is built. The
process reads its task from standard input and writes the features to standard output: if it or its parent is killed,
nothing is left behind.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dinov3_server.backbone.parity.reference_images import reference_images
from dinov3_server.backbone.parity.upstream import UpstreamModel, cut
from dinov3_server.backbone.runners.base import TORCH_DTYPES
from dinov3_server.backbone.weights.checkpoint import Checkpoint, load_checkpoint
from dinov3_server.errors import UpstreamCodeError
from dinov3_server.models.interface import FeatureDtype, Output, TokenKind
from dinov3_server.models.variant import DatasetName, Variant
from dinov3_server.signals import die_with

COMPARED: tuple[TokenKind, ...] = ("cls", "patches")

# For each reference image: [D] cls and [P, D] patches, fp32, on the CPU.
ReferenceFeatures = list[dict[TokenKind, Tensor]]

# Lines of the failed process's stderr that an error quotes: the end of a traceback is what matters.
_LAST_LINES = 6


class UpstreamProcessFailed(Exception):
    """The process that runs Meta's code failed. The message has its exit status and the end of its stderr."""


class UpstreamTask(NamedTuple):
    """The weights that ours use, the checkout of Meta's code, and the dtypes to compute features in."""

    weights: Path
    checkout: Path
    revision: str  # commit of the checkout
    variant: Variant
    dataset: DatasetName
    dtypes: tuple[FeatureDtype, ...]
    device: str
    threads: int


def upstream_features(task: UpstreamTask) -> dict[FeatureDtype, ReferenceFeatures]:
    """Compute features of the reference images with Meta's code.

    Call it on the main thread: the process dies with the thread that starts it. Raises UpstreamProcessFailed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "dinov3_server.backbone.parity.upstream_process", str(os.getpid())],
        input=pickle.dumps(tuple(task)),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise UpstreamProcessFailed(_failure(done.returncode, done.stderr.decode(errors="replace")))
    features: dict[FeatureDtype, ReferenceFeatures] = torch.load(io.BytesIO(done.stdout), weights_only=True)
    return features


def _failure(code: int, stderr: str) -> str:
    ended = f"exit status {code}"
    if code < 0:
        ended = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            ended += ", as the kernel does when memory runs out"
    return "\n    ".join([ended, *map(cut, stderr.rstrip().splitlines()[-_LAST_LINES:])])


def main() -> int:
    die_with(int(sys.argv[1]))
    # Redirect prints to stderr, so that they do not mix with the features.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        try:
            features = _compute(UpstreamTask(*pickle.load(sys.stdin.buffer)))
        except UpstreamCodeError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        torch.save(features, out)
    return 0


def _compute(task: UpstreamTask) -> dict[FeatureDtype, ReferenceFeatures]:
    torch.set_num_threads(task.threads)
    checkpoint = load_checkpoint(task.weights, task.variant, task.dataset)
    return {dtype: _features(task, checkpoint, dtype) for dtype in task.dtypes}


@torch.inference_mode()
def _features(task: UpstreamTask, checkpoint: Checkpoint, dtype: FeatureDtype) -> ReferenceFeatures:
    device = torch.device(task.device)
    model = UpstreamModel(task.checkout, checkpoint, dtype=TORCH_DTYPES[dtype], device=device)
    features: ReferenceFeatures = []
    for image in reference_images():
        computed = model(torch.from_numpy(image)[None].to(device), [Output(kind) for kind in COMPARED])
        features.append({output.kind: tokens[0].cpu().clone() for output, tokens in computed.items()})
    return features


if __name__ == "__main__":
    sys.exit(main())
