"""The proof at start that what is served are the features of Meta's code.

Meta's code computes the probes (probe.py) in float32 from the same weights, in a process of its own; then ours does, in
float32, which shows the algebra (folded scales and normalisation, interleaved channels, the reading of names) to within
rounding; then the very runner that will serve does, in its own dtype, which Meta's code is run in too, for a measure of
what rounding does to these weights. Not more than one model is in memory at a time.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import dinov3_server
from dinov3_server import host
from dinov3_server.backbone.parity import reference_images as probe
from dinov3_server.backbone.parity.store import Kept, ParityStore
from dinov3_server.backbone.parity.upstream_process import PROVEN, Features, NotRun, upstream_features
from dinov3_server.backbone.runners.base import TorchRunner
from dinov3_server.backbone.runners.self_test import run_image
from dinov3_server.backbone.weights.checkpoint import Checkpoint
from dinov3_server.errors import CheckpointError, ParityError
from dinov3_server.models.interface import (
    NOT_CHECKED,
    FeatureDtype,
    FeatureSpec,
    Output,
    OutputParity,
    ParityCheck,
    Provisioned,
)

log = logging.getLogger(__name__)

Step = Callable[[str, str], AbstractContextManager[None]]


class Bound(NamedTuple):
    """What an output must reach: the cosine of every token, and the relative error of every image."""

    cosine: float
    relative_error: float


# float32 differs by the order of sums alone: some 1e-6, and up to 1e-4 in large models whose weights multiply any
# difference. The mildest mistake that we know of, RoPE periods rounded otherwise than they should be, is 2e-3 in CLS
# (docs/architecture.md has the figures).
EXACT = Bound(0.9999, 1e-3)
# How far rounding to bfloat16 takes features depends on the weights; Meta's own code in bfloat16 shows how far. Ours
# may be this many times as far from Meta's float32, in 1 - cosine and in relative error; or, where rounding
# hardly shows and ratios say little, as far as `NEAR`.
MARGIN = Bound(4.0, 2.0)
NEAR = Bound(0.999, 0.05)

# The code that computes features, by which a parity check is kept: a version may be several while it is worked on.
PACKAGE = Path(dinov3_server.__file__).parent
CODE = ("backbone", "families", "models", "nn", "host.py")

_NOT_PREPROCESSING = (
    "The way from an image file to pixels (decoding, resizing) is not compared: the proof begins with pixels."
)
_NOT_NAMES = (
    "The weights are not in Meta's own layout: Meta's code was given them under the names that we translated theirs "
    "to, so that a mistake in that translation would not show."
)


@dataclass(frozen=True)
class Claim:
    """What is to be shown: that these weights, served in this dtype on this device, give the features of that code."""

    checkpoint: Checkpoint
    weights: Path | None  # where the checkpoint was read from; None where it is random
    fingerprint: str
    dtype: FeatureDtype
    device: torch.device
    threads: int
    provisioned: Provisioned | None
    folder: Path | None  # of parity checks

    def about(self, revision: str) -> dict[str, str | int]:
        """Everything that the figures depend on."""
        return {
            "code": _code_digest(),
            "device": _name(self.device),
            "fingerprint": self.fingerprint,
            "names": "translated" if self.checkpoint.official is None else "Meta's",
            "probe": probe.VERSION,
            "revision": revision,
            "torch": torch.__version__,
        }

    def not_covered(self) -> str:
        return f"{_NOT_NAMES} {_NOT_PREPROCESSING}" if self.checkpoint.official is None else _NOT_PREPROCESSING


@dataclass(frozen=True)
class _Theirs:
    """What Meta's features are computed from."""

    weights: Path
    checkout: Path
    revision: str


def certified(claim: Claim, load: Callable[[FeatureDtype], TorchRunner], step: Step) -> TorchRunner:
    """The runner that serves, with a parity check: a kept one, a new one, or one with the reason why there is none.

    `load` builds the model in a dtype; `step` times and logs what takes long. Raises ParityError where the
    features are not Meta's, or where that cannot be found out; CheckpointError where Meta's are no numbers.
    """
    theirs = _theirs(claim)
    if isinstance(theirs, str):
        return _build(claim, load, step, replace(NOT_CHECKED, reason=theirs))
    assert claim.folder is not None
    folder = ParityStore(claim.folder, claim.about(theirs.revision))
    parity_check = _holding(folder.read(), claim)
    if parity_check is None:
        with folder.locked():
            # Another process may have proven the same while this one waited.
            parity_check = _holding(folder.read(), claim)
            if parity_check is None:
                runner, rounding = _prove(claim, theirs, load, step)
                folder.write(Kept(runner.info.parity_check, rounding))
                return runner
    return _build(claim, load, step, parity_check)


def _theirs(claim: Claim) -> _Theirs | str:
    """What Meta's features come from; or why there are none to compare with."""
    if claim.weights is None:
        return "random weights: nothing to verify"
    if claim.provisioned is None:
        return NOT_CHECKED.reason
    if claim.folder is None:
        return "the setting `parity_check` is false"
    if claim.provisioned.checkout is None:
        return claim.provisioned.unavailable_reason
    return _Theirs(claim.weights, Path(claim.provisioned.checkout), claim.provisioned.revision)


def _build(
    claim: Claim, load: Callable[[FeatureDtype], TorchRunner], step: Step, parity_check: ParityCheck
) -> TorchRunner:
    with step("build", f"{claim.dtype} on {claim.device}"):
        runner = load(claim.dtype)
    runner.info = replace(runner.info, parity_check=parity_check)
    return runner


def _prove(
    claim: Claim, theirs: _Theirs, load: Callable[[FeatureDtype], TorchRunner], step: Step
) -> tuple[TorchRunner, tuple[OutputParity, ...]]:
    """The runner with a new parity check, and what Meta's own rounding is (see Kept)."""
    checkpoint = claim.checkpoint
    dtypes: tuple[FeatureDtype, ...] = ("float32",) if claim.dtype == "float32" else ("float32", claim.dtype)
    try:
        with step(
            "upstream", f"Meta's code at {theirs.revision[:12]}: {len(probe.SIZES)} images in {' and '.join(dtypes)}"
        ):
            computed = upstream_features(
                theirs.checkout,
                theirs.weights,
                checkpoint.variant,
                checkpoint.dataset.name,
                dtypes,
                device=claim.device,
                threads=claim.threads,
            )
    except NotRun as error:
        raise ParityError(
            f"Meta's code could not be run, so nobody knows whether the features of {checkpoint.variant.name} would be "
            f"the right ones: {error}\nMend that, or serve them unproven: --parity-check false "
            "(DINOV3_PARITY_CHECK=false)"
        ) from None
    expected = computed["float32"]
    if not all(bool(tokens.isfinite().all()) for features in expected for tokens in features.values()):
        raise CheckpointError(
            f"{theirs.weights}: Meta's own code gives NaN or infinite features with these weights: the file is "
            f"damaged, or does not belong to {checkpoint.variant.name}"
        )
    proofs: list[OutputParity] = []
    rounding: tuple[OutputParity, ...] = ()
    if claim.dtype != "float32":
        rounding = tuple(compare(computed[claim.dtype], expected, claim.dtype))
        with step("parity_check", "ours in float32"):
            proofs += compare(_of_float32(claim, load), expected, "float32")
        _check(claim, theirs, proofs, rounding)
    parity_check = ParityCheck(
        verified=True,
        reason="",
        revision=theirs.revision,
        outputs=(),
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        not_covered=claim.not_covered(),
    )
    runner = _build(claim, load, step, parity_check)
    with step("parity_check", f"ours in {claim.dtype}, as it will serve"):
        proofs += compare(_features(runner), expected, claim.dtype)
    _check(claim, theirs, proofs, rounding)
    runner.info = replace(runner.info, parity_check=replace(parity_check, outputs=tuple(proofs)))
    return runner, rounding


def _of_float32(claim: Claim, load: Callable[[FeatureDtype], TorchRunner]) -> Features:
    """Ours in float32, with nothing of the model left in memory."""
    runner = load("float32")
    features = _features(runner)
    runner.close()
    del runner
    if claim.device.type == "cuda":
        torch.cuda.empty_cache()
    return features


def compare(ours: Features, theirs: Features, dtype: FeatureDtype) -> list[OutputParity]:
    """How near each output is, at worst, over all probes and tokens. `dtype` is that of ours."""
    proofs = []
    for kind in PROVEN:
        pairs = [(a[kind].double(), b[kind].double()) for a, b in zip(ours, theirs, strict=True)]
        cosines = [float(F.cosine_similarity(a, b, dim=-1).min()) for a, b in pairs]
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        proofs.append(OutputParity(kind, dtype, least_cosine=min(cosines), relative_error=max(errors)))
    return proofs


def bound(proof: OutputParity, rounding: Iterable[OutputParity]) -> Bound:
    """What `proof` must reach, where Meta's own code in the serving dtype reaches `rounding`."""
    for theirs in rounding:
        if (theirs.output, theirs.dtype) == (proof.output, proof.dtype):
            return Bound(
                min(NEAR.cosine, 1 - MARGIN.cosine * (1 - theirs.least_cosine)),
                max(NEAR.relative_error, MARGIN.relative_error * theirs.relative_error),
            )
    return EXACT


def holds(proof: OutputParity, rounding: Iterable[OutputParity]) -> bool:
    """Whether it reaches its bound; what is not a number does not."""
    least = bound(proof, rounding)
    return proof.least_cosine >= least.cosine and proof.relative_error <= least.relative_error


def _features(runner: TorchRunner) -> Features:
    # In float32 whatever it computes in: not the rounding of an answer is in question.
    spec = FeatureSpec(tuple(Output(kind) for kind in PROVEN), "float32")
    return [
        dict(zip(PROVEN, run_image(runner, torch.from_numpy(image), spec), strict=True)) for image in probe.probes()
    ]


def _check(claim: Claim, theirs: _Theirs, proofs: Sequence[OutputParity], rounding: Sequence[OutputParity]) -> None:
    failed = [proof for proof in proofs if not holds(proof, rounding)]
    if not failed:
        return
    lines = []
    for proof in proofs:
        least = bound(proof, rounding)
        lines.append(
            f"    {proof.output} in {proof.dtype}: cosine {proof.least_cosine:.6f} (at least {least.cosine:.6f}), "
            f"relative error {proof.relative_error:.1e} (at most {least.relative_error:.1e})"
            + (": FAILS" if proof in failed else "")
        )
    # Where float32 passes, the model is the right one.
    exact = "" if failed[0].dtype == "float32" else "--dtype float32 serves features that pass; "
    raise ParityError(
        "\n".join(
            (
                f"the features of {claim.checkpoint.variant.name} on {_name(claim.device)} are not those of Meta's "
                f"code at {theirs.revision}:",
                *lines,
                "They are not served. Please report it, with these figures. Until it is mended: "
                f"{exact}--backbone reference serves Meta's own modules; --parity-check false serves these, unproven.",
            )
        )
    )


def _holding(kept: Kept | None, claim: Claim) -> ParityCheck | None:
    """A kept parity check if it shows what is claimed, by the bounds of today."""
    if kept is None:
        return None
    parity_check, rounding = kept
    serving = {(kind, claim.dtype) for kind in PROVEN}
    wanted = serving | {(kind, "float32") for kind in PROVEN}
    shown = {(proof.output, proof.dtype) for proof in parity_check.outputs}
    judged = {(proof.output, proof.dtype) for proof in rounding}
    if (
        not parity_check.verified
        or shown != wanted
        or judged != (set() if claim.dtype == "float32" else serving)
        or not all(holds(proof, rounding) for proof in parity_check.outputs)
    ):
        log.warning("a kept parity check does not reach the bounds of today: the features are compared again")
        return None
    return parity_check


def _code_digest() -> str:
    """Return 16 hex digits of every module in CODE, subfolders included."""
    digest = hashlib.sha256()
    for path in sorted(path for name in CODE for path in [PACKAGE / name, *(PACKAGE / name).rglob("*.py")]):
        if path.is_file():
            name = path.relative_to(PACKAGE).as_posix()
            digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _name(device: torch.device) -> str:
    """What computes: figures of one kind of device say nothing about another."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    bf16 = ", native bfloat16" if host.has_native_bf16() else ""
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}{bf16})"
