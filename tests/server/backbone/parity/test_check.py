"""The proof at start, with a small stand-in for Meta's code: what is proven, refused, kept and said."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3_server.backbone import runner
from dinov3_server.backbone.model import native_model
from dinov3_server.backbone.parity import check
from dinov3_server.backbone.parity.check import EXACT, NEAR, bound, compare, holds
from dinov3_server.backbone.parity.upstream_process import Features, NotRun, upstream_features
from dinov3_server.backbone.runner import build
from dinov3_server.backbone.runners.base import TorchRunner
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.errors import CheckpointError, ParityError, UpstreamCodeError
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import OutputParity, Provisioned
from tests.server.backbone.features import CPU
from tests.server.backbone.files import official_state, transformers_state
from tests.support.upstream_code import write_checkout

TINY = dataclasses.replace(lookup("vits16"), embed_dim=64, depth=2, heads=2, ffn_dim=128)
REVISION = "0123456789abcdef0123456789abcdef01234567"
WAY_OUT = "--parity-check false"


@pytest.fixture(autouse=True)
def _small_vits16(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny` is a model name, and `build` leaves the number of threads alone."""
    monkeypatch.setattr(runner, "lookup", lambda name: TINY if name == "tiny" else lookup(name))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


class Start:
    """What a worker is given: a tiny model in Meta's layout, and a stand-in for their code; `changes` break it."""

    def __init__(self, folder: Path, changes: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.weights = folder / "tiny_pretrain_lvd1689m.pth"
        torch.save(official_state(TINY, random_tensors(TINY, 5)), self.weights)
        self.checkout = write_checkout(folder / "code", changes)
        self.home = folder / "parity"
        self.provisioned = Provisioned(str(self.weights), "the label", REVISION, str(self.checkout))

    def __call__(self, dtype: str = "float32", **changes: Any) -> TorchRunner:
        arguments = {"provisioned": self.provisioned, "parity_folder": str(self.home), "warm_up": (), "threads": 1}
        return build("tiny", str(self.weights), dtype=dtype, **{**arguments, **changes})

    def kept(self) -> list[Path]:
        return sorted(self.home.glob("*.json"))


class Counted:
    """`upstream_features` without a process: counted, and what the real one gave or `failure`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, features: dict[Any, Features]) -> None:
        self.features, self.calls = features, 0
        self.failure: Exception | None = None
        monkeypatch.setattr(check, "upstream_features", self)

    def __call__(self, *_: object, **__: object) -> dict[Any, Features]:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        return self.features


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Features]:
    """What the stand-in computes, in a process of its own."""
    start = Start(tmp_path_factory.mktemp("computed"))
    return upstream_features(
        start.checkout, start.weights, TINY, "lvd1689m", ("float32", "bfloat16"), device=CPU, threads=1
    )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, computed: dict[Any, Features]) -> Counted:
    return Counted(monkeypatch, computed)


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path)


# --- the process -------------------------------------------------------------------------------------


def test_right_features_are_proven_and_the_checkout_is_not_written_to(start: Start) -> None:
    before = {path: path.stat().st_mtime_ns for path in start.checkout.rglob("*")}
    served = start("bfloat16")
    shown = served.info.parity_check
    assert shown.verified
    assert shown.reason == ""
    assert shown.revision == REVISION
    assert [(proof.output, proof.dtype) for proof in shown.outputs] == [
        ("cls", "float32"),
        ("patches", "float32"),
        ("cls", "bfloat16"),
        ("patches", "bfloat16"),
    ]
    assert all(proof.relative_error < 1e-5 for proof in shown.outputs if proof.dtype == "float32")
    assert all(1e-4 < proof.relative_error < 0.05 for proof in shown.outputs if proof.dtype == "bfloat16")
    assert "decoding, resizing" in shown.not_covered
    assert "layout" not in shown.not_covered
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
def test_what_is_wrong_or_cannot_be_run_is_not_served(tmp_path: Path, changes: str, words: tuple[str, ...]) -> None:
    start = Start(tmp_path, changes)
    with pytest.raises(ParityError) as refused:
        start()
    assert all(word in str(refused.value) for word in (*words, "dinov3_vits16"))
    assert len(str(refused.value)) < 2000
    assert refused.value.exit_code == 8
    assert not start.kept()


# --- what is compared --------------------------------------------------------------------------------


def test_one_wrong_token_of_one_image_is_seen(start: Start, counted: Counted) -> None:
    patches = counted.features["float32"][1]["patches"].clone()
    patches[7] = patches[8]
    right = counted.features["float32"]
    counted.features = {"float32": [right[0], {**right[1], "patches": patches}, right[2]]}
    with pytest.raises(ParityError, match=r"patches in float32: .*FAILS"):
        start()


def test_another_files_weights_are_seen(start: Start, counted: Counted) -> None:
    torch.save(official_state(TINY, random_tensors(TINY, 6)), start.weights)
    with pytest.raises(ParityError, match=r"cls in float32: .*FAILS"):
        start()


def test_what_signs_a_url_is_not_logged_where_wget_made_it_a_name(
    start: Start, counted: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    start.weights = start.weights.rename(f"{start.weights}?Policy=secret")
    with caplog.at_level(logging.INFO):
        start()
    assert "load: read took" in caplog.text
    assert "secret" not in caplog.text


def test_weights_of_which_metas_own_features_are_no_numbers(start: Start, counted: Counted) -> None:
    broken = [{kind: tokens.clone() for kind, tokens in features.items()} for features in counted.features["float32"]]
    broken[-1]["patches"][-1, -1] = torch.nan
    counted.features = {"float32": broken}
    with pytest.raises(CheckpointError, match=r"tiny_pretrain_lvd1689m.pth: Meta's own code gives NaN or infinite"):
        start()
    assert not start.kept()


def test_a_dtype_that_serves_worse_than_metas_own_code(
    start: Start, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then float32 is named as what passes."""
    original = runner._model

    def broken(*arguments: Any) -> Any:
        model = original(*arguments)
        if arguments[1] == torch.bfloat16:
            model._norm.weight[::2] *= 1.5
        return model

    monkeypatch.setattr(runner, "_model", broken)
    with pytest.raises(ParityError) as refused:
        start("bfloat16")
    assert "cls in bfloat16" in str(refused.value)
    assert "--dtype float32 serves features that pass" in str(refused.value)
    assert start("float32").info.parity_check.verified


def test_compare() -> None:
    theirs: Features = [{"cls": torch.tensor([3.0, 4.0]), "patches": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}]
    ours: Features = [{"cls": torch.tensor([4.0, 3.0]), "patches": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}]
    cls, patches = compare(ours + theirs, theirs + theirs, "bfloat16")
    assert cls == OutputParity("cls", "bfloat16", pytest.approx(24 / 25), pytest.approx(2**0.5 / 5))  # type: ignore[arg-type]
    assert patches == OutputParity("patches", "bfloat16", pytest.approx(1.0), pytest.approx(5**-0.5))  # type: ignore[arg-type]


def test_what_is_not_finite_does_not_hold() -> None:
    wild: Features = [{"cls": torch.full((4,), torch.nan), "patches": torch.full((2, 4), torch.inf)}]
    plain: Features = [{"cls": torch.ones(4), "patches": torch.ones(2, 4)}]
    assert not any(holds(proof, ()) for proof in compare(wild, plain, "float32"))
    assert not any(holds(proof, compare(wild, plain, "bfloat16")) for proof in compare(wild, plain, "bfloat16"))


def test_bounds() -> None:
    proof = OutputParity("cls", "bfloat16", 0.99, 0.1)
    assert bound(dataclasses.replace(proof, dtype="float32"), [proof]) == EXACT
    assert bound(proof, [proof]) == (pytest.approx(0.96), pytest.approx(0.2))
    assert bound(proof, [dataclasses.replace(proof, least_cosine=0.99999, relative_error=0.001)]) == NEAR
    assert holds(dataclasses.replace(proof, least_cosine=0.961, relative_error=0.199), [proof])
    assert not holds(dataclasses.replace(proof, least_cosine=0.959), [proof])
    assert not holds(dataclasses.replace(proof, relative_error=0.201), [proof])


# --- what is not tried -------------------------------------------------------------------------------


def test_what_is_not_verified_says_why(start: Start, counted: Counted) -> None:
    absent = dataclasses.replace(start.provisioned, checkout=None, unavailable_reason="the moon is full")
    for changes, reason in (
        ({"provisioned": absent}, "the moon is full"),
        ({"provisioned": None}, "no comparison was run"),
        ({"parity_folder": None}, "the setting `parity_check` is false"),
    ):
        shown = start(**changes).info.parity_check
        assert (shown.verified, shown.reason, shown.outputs) == (False, reason, ())
    served = build("tiny", "random:1", dtype="float32", warm_up=(), provisioned=start.provisioned, parity_folder="/x")
    assert served.info.parity_check.reason == "random weights: nothing to verify"
    assert counted.calls == 0
    assert not start.home.exists()


def test_translated_names_are_said_not_to_be_covered(start: Start, counted: Counted, tmp_path: Path) -> None:
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
        parity_folder=str(start.home),
    )
    assert served.info.parity_check.verified
    assert "not in Meta's own layout" in served.info.parity_check.not_covered
    # The same model; yet what was shown of the official file says more.
    assert (counted.calls, len(start.kept())) == (2, 2)


# --- what is kept ------------------------------------------------------------------------------------


def test_a_restart_does_not_prove_again(start: Start, counted: Counted) -> None:
    for dtype in ("float32", "bfloat16"):
        first, second = start(dtype), start(dtype)
        assert second.info.parity_check == first.info.parity_check
        assert list(second.load_seconds) == ["read", "fingerprint", "build", "warm_up"]
    assert counted.calls == 2
    assert len(start.kept()) == 2


def test_a_proof_is_of_one_revision_and_of_one_code(
    start: Start, counted: Counted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def with_a_line_more(module: str) -> Path:
        changed = tmp_path / module.replace("/", "-")
        shutil.copytree(check.PACKAGE, changed, ignore=shutil.ignore_patterns("__pycache__"))
        with (changed / module).open("a") as file:
            file.write("# One line more.\n")
        return changed

    start()
    other = dataclasses.replace(start.provisioned, revision="f" * 40)
    assert start(provisioned=other).info.parity_check.revision == "f" * 40
    assert counted.calls == 2
    for module, name, value in (
        (check, "PACKAGE", with_a_line_more("nn/linear.py")),
        (check, "PACKAGE", with_a_line_more("backbone/runners/cpu.py")),
        (check, "PACKAGE", with_a_line_more("backbone/weights/checkpoint.py")),
        (check, "PACKAGE", with_a_line_more("families/dinov3_vit/model.py")),
        (check, "PACKAGE", with_a_line_more("models/variant.py")),
        (check.probe, "VERSION", 0),
        (torch, "__version__", "0"),
        (check.host, "has_native_bf16", lambda: "of another machine"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            calls = counted.calls
            start()
            assert counted.calls == calls + (name != "has_native_bf16" or not check.host.has_native_bf16())
    start()
    assert len(start.kept()) == counted.calls


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace(REVISION, "f" * 40),
        lambda text: text.replace('"verified": true', '"verified": "yes"'),
        lambda text: text.replace('"verified": true', '"verified": false'),
        lambda text: text.replace('"output": "cls"', '"output": "registers"'),
        lambda text: json.dumps({**json.loads(text), "rounding": []}),
    ],
)
def test_a_kept_parity_check_that_says_something_else_is_proven_anew(
    start: Start, counted: Counted, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shown = start("bfloat16").info.parity_check
    [path] = start.kept()
    whole = path.read_text()
    path.write_text(damage(whole))
    again = start("bfloat16").info.parity_check
    assert dataclasses.replace(again, time=shown.time) == shown
    assert counted.calls == 2
    assert "the features are compared again" in caplog.text
    assert json.loads(path.read_text()).keys() == json.loads(whole).keys()


def test_a_kept_parity_check_is_held_against_the_bounds_of_today(
    start: Start, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    monkeypatch.setattr(check, "EXACT", check.Bound(1.0, 0.0))
    with pytest.raises(ParityError):
        start()
    assert counted.calls == 2


def test_of_several_at_once_one_proves(
    start: Start, counted: Counted, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is made to wait for the first by its lock, which does not tell threads from processes."""
    waiting = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "another process is doing it" in record.getMessage():
                waiting.set()

    def slowly(*arguments: Any, **named: Any) -> Any:
        assert waiting.wait(30)
        return counted(*arguments, **named)

    monkeypatch.setattr(check, "upstream_features", slowly)
    listener, logger = Listener(), logging.getLogger("dinov3_server.storage")
    logger.addHandler(listener)
    try:
        with caplog.at_level(logging.INFO), ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda _: start().info.parity_check, range(2))
    finally:
        logger.removeHandler(listener)
    assert first == second
    assert counted.calls == 1


def test_a_folder_that_cannot_be_written_costs_a_proof_each_time(
    start: Start, counted: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    start.home.write_text("a file where a folder is wanted")
    for calls in (1, 2):
        assert start().info.parity_check.verified
        assert counted.calls == calls
    assert "the parity check is not kept" in caplog.text


def test_a_kept_parity_check_needs_no_lock(start: Start, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a volume that is mounted read-only after the first start."""
    start()
    monkeypatch.setattr("dinov3_server.backbone.parity.store.locked", None)
    assert start().info.parity_check.verified
    assert counted.calls == 1


def test_nothing_is_kept_of_what_could_not_be_run(start: Start, counted: Counted) -> None:
    counted.failure = NotRun("exit status 3")
    with pytest.raises(ParityError, match=r"could not be run.*exit status 3"):
        start()
    assert not start.kept()
    counted.failure = None
    assert start().info.parity_check.verified


# --- --backbone reference -----------------------------------------------------------------------------


def test_metas_modules_are_not_served_where_they_are_not(start: Start) -> None:
    absent = dataclasses.replace(start.provisioned, checkout=None, unavailable_reason="the moon is full")
    for provisioned, reason in ((absent, "the moon is full"), (None, "nothing was provisioned")):
        with pytest.raises(UpstreamCodeError, match=f"{reason}.*dinov3-server vendor"):
            start(backbone="reference", provisioned=provisioned)


def test_metas_modules_have_a_fingerprint_of_their_own(
    start: Start, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "UpstreamModel", lambda checkout, *args, **options: native_model(*args, **options))
    mine = start().info.fingerprint
    theirs = start(backbone="reference").info
    other = dataclasses.replace(start.provisioned, revision="f" * 40)
    assert theirs.parity_check.verified
    assert len({mine, theirs.fingerprint, start(backbone="reference", provisioned=other).info.fingerprint}) == 3
