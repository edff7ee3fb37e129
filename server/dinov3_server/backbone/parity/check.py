"""The parity check at start: compares the served features with those of Meta's code on the same weights.

The features of the reference images (reference_images.py) are computed three times:

1. by Meta's code in float32, and in the serving dtype to measure what rounding does to these weights, in a separate
   process;
2. by ours in float32, which checks the algebra (folded scales and normalization, interleaved channels, key maps) to
   within rounding;
3. by the runner that will serve, in its own dtype.

At most one model is in memory at a time.
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
from dinov3_server.backbone.parity import reference_images
from dinov3_server.backbone.parity.store import ParityStore
from dinov3_server.backbone.parity.upstream_process import (
    COMPARED,
    ReferenceFeatures,
    UpstreamProcessFailed,
    UpstreamTask,
    upstream_features,
)
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
from dinov3_serving import features, model

log = logging.getLogger(__name__)

Step = Callable[[str, str], AbstractContextManager[None]]


class Bound(NamedTuple):
    """The least cosine of every token, and the largest relative error of every image, that pass the check."""

    cosine: float
    relative_error: float


# In float32 only the order of sums differs: by some 1e-6, and by up to 1e-4 in large models whose weights amplify any
# difference. The smallest known mistake, wrongly rounded RoPE periods, causes 2e-3 in CLS (figures in
# docs/architecture.md).
EXACT = Bound(0.9999, 1e-3)
# The error of rounding to bfloat16 depends on the weights; Meta's own code in bfloat16 shows how large it is. Ours may
# be this many times as far from Meta's float32, in 1 - cosine and in relative error; or as far as `NEAR`, as ratios of
# tiny errors mean little.
MARGIN = Bound(4.0, 2.0)
NEAR = Bound(0.999, 0.05)

# The code that computes features, and these bounds. A stored result holds its hash, as code may change without a new
# version.
PACKAGE = Path(dinov3_server.__file__).parent
CODE = ("backbone", "families", "models", "nn", "host.py")

_NOT_PREPROCESSING = "Decoding and resizing of image files are not compared: the check begins with pixels."
_NOT_NAMES = (
    "The weights are not in Meta's own layout: their names were translated for Meta's code too, so a mistake in that "
    "translation would not show."
)


@dataclass(frozen=True)
class ParityInputs:
    """The inputs of a parity check: weights, serving dtype, device, and what was provisioned."""

    checkpoint: Checkpoint
    weights: Path | None  # where the checkpoint was read from; None for random weights
    fingerprint: str
    dtype: FeatureDtype
    device: torch.device
    threads: int
    provisioned: Provisioned | None
    folder: Path | None  # of stored results; None if the check is disabled

    def identity(self, revision: str) -> dict[str, str | int]:
        """Return everything that the result depends on."""
        return {
            "code": _code_digest(),
            "device": _device_name(self.device),
            "fingerprint": self.fingerprint,
            "names": "translated" if self.checkpoint.official is None else "Meta's",
            "reference_images": reference_images.VERSION,
            "revision": revision,
            "torch": torch.__version__,
        }

    def not_covered(self) -> str:
        return f"{_NOT_NAMES} {_NOT_PREPROCESSING}" if self.checkpoint.official is None else _NOT_PREPROCESSING


def checked_runner(inputs: ParityInputs, load: Callable[[FeatureDtype], TorchRunner], step: Step) -> TorchRunner:
    """Build the runner that serves, with its parity check: a stored result, a new one, or the reason for none.

    `load` builds the model in a dtype; `step` times and logs slow steps. Raises ParityError if the features are not
    Meta's or cannot be compared, and CheckpointError if Meta's features are not finite.
    """
    task = _upstream_task(inputs)
    if isinstance(task, str):
        return _build(inputs, load, step, replace(NOT_CHECKED, reason=task))
    assert inputs.folder is not None
    store = ParityStore(inputs.folder, inputs.identity(task.revision))
    parity_check = store.read()
    if parity_check is None:
        with store.locked():
            parity_check = store.read()  # another process may have stored it while this one waited
            if parity_check is None:
                runner = _compare_with_reference(inputs, task, load, step)
                store.write(runner.info.parity_check)
                return runner
    return _build(inputs, load, step, parity_check)


def _upstream_task(inputs: ParityInputs) -> UpstreamTask | str:
    """Return what to compute Meta's features from, or why they cannot be computed."""
    if inputs.weights is None:
        return "random weights: nothing to verify"
    if inputs.provisioned is None:
        return NOT_CHECKED.reason
    if inputs.folder is None:
        return "the setting `parity_check` is false"
    if inputs.provisioned.checkout is None:
        return inputs.provisioned.unavailable_reason
    return UpstreamTask(
        inputs.weights,
        Path(inputs.provisioned.checkout),
        inputs.provisioned.revision,
        inputs.checkpoint.variant,
        inputs.checkpoint.dataset.name,
        ("float32",) if inputs.dtype == "float32" else ("float32", inputs.dtype),
        str(inputs.device),
        inputs.threads,
    )


def _build(
    inputs: ParityInputs, load: Callable[[FeatureDtype], TorchRunner], step: Step, parity_check: ParityCheck
) -> TorchRunner:
    with step("build", f"{inputs.dtype} on {inputs.device}"):
        runner = load(inputs.dtype)
    runner.info = replace(runner.info, parity_check=parity_check)
    return runner


def _compare_with_reference(
    inputs: ParityInputs, task: UpstreamTask, load: Callable[[FeatureDtype], TorchRunner], step: Step
) -> TorchRunner:
    """Build the runner with a new parity check."""
    variant, images = task.variant.name, len(reference_images.SIZES)
    try:
        with step("upstream", f"Meta's code at {task.revision[:12]}: {images} images in {' and '.join(task.dtypes)}"):
            computed = upstream_features(task)
    except UpstreamProcessFailed as error:
        raise ParityError(
            f"Meta's code could not be run, so the features of {variant} cannot be compared with it: "
            f"{error}\nFix that, or serve them unverified: --parity-check false (DINOV3_PARITY_CHECK=false)"
        ) from None
    expected = computed["float32"]
    if not all(bool(tokens.isfinite().all()) for features in expected for tokens in features.values()):
        raise CheckpointError(
            f"{task.weights}: Meta's own code gives NaN or infinite features with these weights: the file is "
            f"damaged, or does not belong to {variant}"
        )
    outputs: list[OutputParity] = []
    rounding: tuple[OutputParity, ...] = ()
    if inputs.dtype != "float32":
        rounding = tuple(compare(computed[inputs.dtype], expected, inputs.dtype))
        with step("parity_check", "ours in float32"):
            outputs += compare(_float32_features(inputs, load), expected, "float32")
        _require_parity(inputs, task, outputs, rounding)
    parity_check = ParityCheck(
        verified=True,
        reason="",
        upstream_revision=task.revision,
        outputs=(),
        time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        not_covered=inputs.not_covered(),
    )
    runner = _build(inputs, load, step, parity_check)
    with step("parity_check", f"ours in {inputs.dtype}, as it will serve"):
        outputs += compare(_features(runner), expected, inputs.dtype)
    _require_parity(inputs, task, outputs, rounding)
    runner.info = replace(runner.info, parity_check=replace(parity_check, outputs=tuple(outputs)))
    return runner


def _float32_features(inputs: ParityInputs, load: Callable[[FeatureDtype], TorchRunner]) -> ReferenceFeatures:
    """Compute our features in float32, and free the model."""
    runner = load("float32")
    features = _features(runner)
    runner.close()
    del runner
    if inputs.device.type == "cuda":
        torch.cuda.empty_cache()
    return features


def compare(ours: ReferenceFeatures, reference: ReferenceFeatures, dtype: FeatureDtype) -> list[OutputParity]:
    """Compare each output over all reference images and tokens. `dtype` is that of ours."""
    outputs = []
    for kind in COMPARED:
        pairs = [(a[kind].double(), b[kind].double()) for a, b in zip(ours, reference, strict=True)]
        cosines = [float(F.cosine_similarity(a, b, dim=-1).min()) for a, b in pairs]
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        outputs.append(OutputParity(kind, dtype, least_cosine=min(cosines), relative_error=max(errors)))
    return outputs


def bound(output: OutputParity, rounding: Iterable[OutputParity]) -> Bound:
    """Return the bound for `output`, given the rounding error of Meta's own code in the serving dtype."""
    for reference in rounding:
        if (reference.output, reference.dtype) == (output.output, output.dtype):
            return Bound(
                min(NEAR.cosine, 1 - MARGIN.cosine * (1 - reference.least_cosine)),
                max(NEAR.relative_error, MARGIN.relative_error * reference.relative_error),
            )
    return EXACT


def passes(output: OutputParity, rounding: Iterable[OutputParity]) -> bool:
    """Return whether `output` is within its bound. NaN never is."""
    limit = bound(output, rounding)
    return output.least_cosine >= limit.cosine and output.relative_error <= limit.relative_error


def _features(runner: TorchRunner) -> ReferenceFeatures:
    # Returned in float32 whatever dtype the model computes in: rounding of the answer is not what is checked.
    spec = FeatureSpec(tuple(Output(kind) for kind in COMPARED), "float32")
    return [
        dict(zip(COMPARED, run_image(runner, torch.from_numpy(image), spec), strict=True))
        for image in reference_images.reference_images()
    ]


def _require_parity(
    inputs: ParityInputs,
    task: UpstreamTask,
    outputs: Sequence[OutputParity],
    rounding: Sequence[OutputParity],
) -> None:
    """Raise ParityError, with all figures, unless every output is within its bound."""
    failed = [output for output in outputs if not passes(output, rounding)]
    if not failed:
        return
    lines = []
    for output in outputs:
        limit = bound(output, rounding)
        lines.append(
            f"    {output.output} in {output.dtype}: cosine {output.least_cosine:.6f} (at least {limit.cosine:.6f}), "
            f"relative error {output.relative_error:.1e} (at most {limit.relative_error:.1e})"
            + (": FAILS" if output in failed else "")
        )
    # If float32 passes, only the serving dtype is at fault.
    exact = "" if failed[0].dtype == "float32" else "--dtype float32 serves features that pass; "
    raise ParityError(
        "\n".join(
            (
                f"the features of {task.variant.name} on {_device_name(inputs.device)} are not those of "
                f"Meta's code at {task.revision}:",
                *lines,
                "They are not served. Please report this, with these figures. Until it is fixed: "
                f"{exact}--backbone reference serves Meta's own modules; --parity-check false serves these unverified.",
            )
        )
    )


def _code_digest() -> str:
    """Return 16 hex digits of a hash of every module in CODE, subfolders included, and of the modules shared
    with clients."""
    digest = hashlib.sha256(b"".join(Path(path).read_bytes() for path in (features.__file__, model.__file__)))
    for path in sorted(path for name in CODE for path in [PACKAGE / name, *(PACKAGE / name).rglob("*.py")]):
        if path.is_file():
            name = path.relative_to(PACKAGE).as_posix()
            digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _device_name(device: torch.device) -> str:
    """Return the kind of device: results of one kind do not hold for another."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    bf16 = ", native bfloat16" if host.has_native_bf16() else ""
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}{bf16})"
