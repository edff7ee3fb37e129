"""The parity check at start, with a small stand-in for Meta's code: which features are served and which refused."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3_server.backbone import runner
from dinov3_server.backbone.parity.check import EXACT, NEAR, bound, compare, passes
from dinov3_server.backbone.parity.upstream_process import ReferenceFeatures
from dinov3_server.backbone.runner import build
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.errors import CheckpointError, ParityError, UpstreamCodeError
from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.models.interface import OutputParity
from dinov3_server.models.variant import Dataset
from tests.server.backbone.files import official_state, transformers_state
from tests.server.backbone.parity.rig import REVISION, TINY, FakeUpstream, Start

WAY_OUT = "--parity-check false"
pytestmark = pytest.mark.usefixtures("tiny_model")


def test_equal_features_are_verified_without_writing_to_the_checkout(start: Start) -> None:
    before = {path: path.stat().st_mtime_ns for path in start.checkout.rglob("*")}
    served = start("bfloat16")
    parity_check = served.info.parity_check
    assert parity_check.verified
    assert parity_check.reason == ""
    assert parity_check.upstream_revision == REVISION
    assert [(output.output, output.dtype) for output in parity_check.outputs] == [
        ("cls", "float32"),
        ("patches", "float32"),
        ("cls", "bfloat16"),
        ("patches", "bfloat16"),
    ]
    assert all(output.relative_error < 1e-5 for output in parity_check.outputs if output.dtype == "float32")
    assert all(1e-4 < output.relative_error < 0.05 for output in parity_check.outputs if output.dtype == "bfloat16")
    assert "Decoding and resizing" in parity_check.not_covered
    assert "layout" not in parity_check.not_covered
    assert served.info.weights == "the label"
    assert {path: path.stat().st_mtime_ns for path in start.checkout.rglob("*")} == before
    assert list(served.load_seconds) == ["read", "fingerprint", "upstream", "parity_check", "build", "warm_up"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("SCALE = 1.01", ("cls in float32: cosine 1.000000", "relative error 9.9e-03 (at most 1.0e-03): FAILS")),
        ("raise RuntimeError('no such driver')", ("exit status 1", "RuntimeError: no such driver", WAY_OUT)),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ("killed by SIGKILL", "memory", WAY_OUT)),
        ("def dinov3_vits16(**_):\n    print('x' * 10**6)\n    raise MemoryError", ("MemoryError", WAY_OUT)),
    ],
    ids=["wrong", "raises", "killed", "noisy"],
)
def test_wrong_or_failing_upstream_code_prevents_the_start(
    tmp_path: Path, changes: str, words: tuple[str, ...]
) -> None:
    start = Start(tmp_path / "changed", changes)
    with pytest.raises(ParityError) as refused:
        start()
    assert all(word in str(refused.value) for word in (*words, "dinov3_vits16"))
    assert len(str(refused.value)) < 2000
    assert refused.value.exit_code == 8
    assert not start.stored()


# --- what is compared --------------------------------------------------------------------------------


def test_one_wrong_token_of_one_image_fails_the_check(start: Start, upstream: FakeUpstream) -> None:
    patches = upstream.features["float32"][1]["patches"].clone()
    patches[7] = patches[8]
    right = upstream.features["float32"]
    upstream.features = {"float32": [right[0], {**right[1], "patches": patches}, right[2]]}
    with pytest.raises(ParityError, match=r"patches in float32: .*FAILS"):
        start()


def test_weights_of_another_file_fail_the_check(start: Start, upstream: FakeUpstream) -> None:
    torch.save(official_state(TINY, random_tensors(TINY, 6)), start.weights)
    with pytest.raises(ParityError, match=r"cls in float32: .*FAILS"):
        start()


def test_signatures_of_urls_in_file_names_are_not_logged(
    start: Start, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    start.weights = start.weights.rename(f"{start.weights}?Policy=secret")
    with caplog.at_level(logging.INFO):
        start()
    assert "load: read took" in caplog.text
    assert "secret" not in caplog.text


def test_non_finite_reference_features_are_a_checkpoint_error(start: Start, upstream: FakeUpstream) -> None:
    broken = [{kind: tokens.clone() for kind, tokens in features.items()} for features in upstream.features["float32"]]
    broken[-1]["patches"][-1, -1] = torch.nan
    upstream.features = {"float32": broken}
    with pytest.raises(CheckpointError, match=r"tiny_pretrain_lvd1689m.pth: Meta's own code gives NaN or infinite"):
        start()
    assert not start.stored()


def test_a_serving_dtype_worse_than_metas_own_rounding_is_refused(
    start: Start, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error recommends float32, which passes."""
    original = VitVariant.build

    def broken(variant: VitVariant, tensors: dict[str, Tensor], dataset: Dataset, **options: Any) -> Any:
        if options["dtype"] == torch.bfloat16:
            weight = tensors["norm.weight"].clone()
            weight[::2] *= 1.5
            tensors = {**tensors, "norm.weight": weight}
        return original(variant, tensors, dataset, **options)

    monkeypatch.setattr(VitVariant, "build", broken)
    with pytest.raises(ParityError) as refused:
        start("bfloat16")
    assert "cls in bfloat16" in str(refused.value)
    assert "--dtype float32 serves features that pass" in str(refused.value)
    assert start("float32").info.parity_check.verified


def test_compare() -> None:
    reference: ReferenceFeatures = [
        {"cls": torch.tensor([3.0, 4.0]), "patches": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}
    ]
    ours: ReferenceFeatures = [{"cls": torch.tensor([4.0, 3.0]), "patches": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}]
    cls, patches = compare(ours + reference, reference + reference, "bfloat16")
    assert cls == OutputParity("cls", "bfloat16", pytest.approx(24 / 25), pytest.approx(2**0.5 / 5))  # type: ignore[arg-type]
    assert patches == OutputParity("patches", "bfloat16", pytest.approx(1.0), pytest.approx(5**-0.5))  # type: ignore[arg-type]


def test_non_finite_features_do_not_pass() -> None:
    wild: ReferenceFeatures = [{"cls": torch.full((4,), torch.nan), "patches": torch.full((2, 4), torch.inf)}]
    right: ReferenceFeatures = [{"cls": torch.ones(4), "patches": torch.ones(2, 4)}]
    assert not any(passes(output, ()) for output in compare(wild, right, "float32"))
    assert not any(passes(output, compare(wild, right, "bfloat16")) for output in compare(wild, right, "bfloat16"))


def test_bounds() -> None:
    output = OutputParity("cls", "bfloat16", 0.99, 0.1)
    assert bound(dataclasses.replace(output, dtype="float32"), [output]) == EXACT
    assert bound(output, [output]) == (pytest.approx(0.96), pytest.approx(0.2))
    assert bound(output, [dataclasses.replace(output, least_cosine=0.99999, relative_error=0.001)]) == NEAR
    assert passes(dataclasses.replace(output, least_cosine=0.961, relative_error=0.199), [output])
    assert not passes(dataclasses.replace(output, least_cosine=0.959), [output])
    assert not passes(dataclasses.replace(output, relative_error=0.201), [output])


def test_an_unverified_model_has_a_reason(start: Start, upstream: FakeUpstream) -> None:
    unavailable = dataclasses.replace(start.provisioned, checkout=None, unavailable_reason="the moon is full")
    for changes, reason in (
        ({"provisioned": unavailable}, "the moon is full"),
        ({"provisioned": None}, "no comparison was run"),
        ({"parity_folder": None}, "the setting `parity_check` is false"),
    ):
        parity_check = start(**changes).info.parity_check
        assert (parity_check.verified, parity_check.reason, parity_check.outputs) == (False, reason, ())
    served = build("tiny", "random:1", dtype="float32", warm_up=(), provisioned=start.provisioned, parity_folder="/x")
    assert served.info.parity_check.reason == "random weights: nothing to verify"
    assert upstream.calls == 0
    assert not start.store.exists()


def test_translated_key_names_are_reported_as_not_covered(start: Start, upstream: FakeUpstream, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    assert start().info.parity_check.verified
    path = tmp_path / "model.safetensors"
    save_file(transformers_state(TINY, random_tensors(TINY, 5), older=True), path)
    served = build(
        "tiny",
        str(path),
        dtype="float32",
        warm_up=(),
        provisioned=dataclasses.replace(start.provisioned, weights=str(path)),
        parity_folder=str(start.store),
    )
    assert served.info.parity_check.verified
    assert "not in Meta's own layout" in served.info.parity_check.not_covered
    # The same model, but the result for Meta's own layout covers more.
    assert (upstream.calls, len(start.stored())) == (2, 2)


def test_the_reference_backbone_needs_metas_code(start: Start) -> None:
    unavailable = dataclasses.replace(start.provisioned, checkout=None, unavailable_reason="the moon is full")
    for provisioned, reason in ((unavailable, "the moon is full"), (None, "nothing was provisioned")):
        with pytest.raises(UpstreamCodeError, match=f"{reason}.*dinov3-server vendor"):
            start(backbone="reference", provisioned=provisioned)


def test_the_reference_backbone_has_its_own_fingerprint(
    start: Start, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "UpstreamModel", lambda checkout, checkpoint, **options: checkpoint.build(**options))
    mine = start().info.fingerprint
    theirs = start(backbone="reference").info
    other = dataclasses.replace(start.provisioned, revision="f" * 40)
    assert theirs.parity_check.verified
    assert len({mine, theirs.fingerprint, start(backbone="reference", provisioned=other).info.fingerprint}) == 3
