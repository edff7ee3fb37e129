"""The command `dinov3-server`, with a fake supervisor."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dinov3_server import cli
from dinov3_server.config.settings import SETTINGS, Settings
from dinov3_server.config.types import BOOLEAN
from dinov3_server.errors import StartupError
from tests.support.waiting import LIMIT


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove settings from the environment, and restore the root logger afterwards."""
    for variable in os.environ:
        if variable.startswith("DINOV3_"):
            monkeypatch.delenv(variable)
    root, ours = logging.getLogger(), logging.getLogger("dinov3_server")
    before = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:], level, our_level = before
    root.setLevel(level)
    ours.setLevel(our_level)
    logging.captureWarnings(False)


class FakeSupervisor(SimpleNamespace):
    """Replaces the supervisor, and records the settings and runners of its runs."""

    def __init__(self, outcome: int | Exception = 0) -> None:
        super().__init__(calls=[])
        self.outcome = outcome

    def __call__(self, settings: Settings, runner: str) -> FakeSupervisor:
        self.calls.append((settings, runner))
        return self

    def run(self) -> int:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> FakeSupervisor:
    fake = FakeSupervisor()
    monkeypatch.setattr("dinov3_server.processes.supervisor.Supervisor", fake)
    return fake


def exits(*argv: str) -> int:
    """Return the exit code, which argparse raises."""
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_serve_passes_the_settings_to_the_supervisor(supervisor: FakeSupervisor) -> None:
    supervisor.outcome = 143
    assert cli.main(["serve", "--weights", "random:1", "--port=0", "--devices", "cpu"], runner="tests.x:build") == 143
    assert supervisor.calls == [(Settings(weights="random:1", port=0, devices=("cpu",)), "tests.x:build")]


def test_serve_uses_the_real_runner_by_default(supervisor: FakeSupervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_WEIGHTS", "random:1")
    monkeypatch.setattr(sys, "argv", ["dinov3-server", "serve", "--drain-seconds", "1"])
    assert cli.main() == 0
    assert supervisor.calls == [
        (Settings(weights="random:1", drain_seconds=1.0), "dinov3_server.backbone.runner:build")
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepare", "--model", "vitb14"], "model 'vitb14' is DINOv2's"),
        (["weights", "--model", "vitb"], "model 'vitb' is not known; did you mean 'vitb16'?"),
        (["weights", "--source", "random:0"], "random weights are made at start: there is nothing to fetch"),
        (["weights", "--model", "all", "--source", "hf://a/b"], "--model all fetches from Hugging Face"),
        (
            ["vendor", "--upstream-revision", "main"],
            "upstream_revision is 'main' (flag --upstream-revision); allowed: the 40 hex digits",
        ),
        (["vendor", "--model", "vits16"], "unknown argument --model"),
        (["weights", "--weights", "auto"], "unknown argument --weights"),
        (["serve", "--model", "vit_giant2", "--weights", "random:0"], "model 'vit_giant2' is DINOv2's"),
        (["serve", "--port", "http"], "port is 'http' (flag --port); allowed: an integer from 0 to 65535"),
        (["config", "--drain-seconds", "-5"], "drain_seconds is '-5' (flag --drain-seconds)"),
        (["config", "--config", "/does/not/exist"], "cannot read '/does/not/exist' (flag --config)"),
        (["config", "--port"], "argument --port: expected one argument"),
        (["serve", "--prot", "0"], "unknown argument --prot; did you mean --port? (see `dinov3-server serve --help`)"),
        (["serve", "--prot=0"], "unknown argument --prot; did you mean --port?"),
        (["serve", "--max-batch", "8"], "unknown argument --max-batch; did you mean --max-batch-"),
        (["serve", "photo.jpg"], "unknown argument photo.jpg (see"),
        (["models", "--port", "0"], "unknown argument --port (see `dinov3-server models --help`)"),
        (["sevre"], "invalid choice: 'sevre'"),
        ([], "the following arguments are required: COMMAND (see `dinov3-server --help`)"),
    ],
)
def test_an_invalid_command_exits_with_2_and_one_line(
    argv: list[str], message: str, supervisor: FakeSupervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("dinov3-server")
    assert err.count("\n") == 1
    assert supervisor.calls == []


def test_a_token_in_the_clients_variable_protects_no_server(
    supervisor: FakeSupervisor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("DINOV3_TOKEN", "secret")
    assert exits("serve", "--weights", "random:0") == 2
    error = capsys.readouterr().err
    assert "--token-file or DINOV3_TOKEN_FILE, or unset DINOV3_TOKEN" in error
    assert "secret" not in error
    assert supervisor.calls == []
    assert exits("config") == 0, "only serve would be open"
    (tmp_path / "token").write_text("secret")
    assert exits("serve", "--weights", "random:0", "--token-file", str(tmp_path / "token")) == 0
    monkeypatch.setenv("DINOV3_TOKEN", "")
    assert exits("serve", "--weights", "random:0") == 0


def test_start_up_errors_of_the_supervisor(supervisor: FakeSupervisor, capsys: pytest.CaptureFixture[str]) -> None:
    supervisor.outcome = StartupError("port 50051 is in use")
    assert exits("serve", "--weights", "random:0") == 2
    assert capsys.readouterr().err == "dinov3-server: port 50051 is in use\n"


def test_unexpected_errors_are_not_hidden(supervisor: FakeSupervisor) -> None:
    supervisor.outcome = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        cli.main(["serve", "--weights", "random:0"])


def test_config_shows_values_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# mine\narena_bytes: 1048576KiB\n")
    monkeypatch.setenv("DINOV3_DEVICES", "cpu, cuda:0")
    monkeypatch.setenv("DINOV3_CONFIG", str(path))
    assert exits("config", "--warm-up-sizes", "none", "--host", "0.0.0.0") == 0
    out, err = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(rows) == ["SETTING", *(setting.name for setting in SETTINGS)]
    shown = {name: rest.split(maxsplit=1) for name, rest in rows.items()}
    assert shown["arena_bytes"] == ["1GiB", f"{path}:2"]
    assert shown["devices"] == ["cpu,cuda:0", "environment DINOV3_DEVICES"]
    assert shown["warm_up_sizes"] == ["none", "flag --warm-up-sizes"]
    assert shown["http_host"] == ["0.0.0.0", "default"]
    assert shown["weights"] == ["auto", "default"]
    assert shown["dataset"] == ["(unset)", "default"]
    assert shown["parity_check"] == ["true", "default"]
    assert shown["max_queue_delay_seconds"] == ["0", "default"]
    assert err == ""


@pytest.mark.parametrize("command", ["config", "serve"])
@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--model", "giant2"], "giant2"),
        (["--warm-up-sizes", "518x518"], "multiples of 16"),
        (["--warm-up-sizes", "4096x4096"], "65541 tokens"),
        (["--model", "convnext_tiny", "--warm-up-sizes", "240x240"], "dinov3_convnext_tiny takes multiples of 32 only"),
        (["--model", "convnext_tiny", "--warm-up-sizes", "4096x4096"], "16385 tokens"),
        (["--max-batch-tokens", "100"], "261 tokens; max_batch_tokens allows an image of 100"),
    ],
)
def test_settings_that_do_not_suit_the_model_are_refused(
    capsys: pytest.CaptureFixture[str], command: str, flags: list[str], wanted: str
) -> None:
    assert cli.main([command, "--weights", "random:0", *flags]) == 2
    assert wanted in capsys.readouterr().err


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("models") == 0
    lines = capsys.readouterr().out.splitlines()
    (large,) = [line.split() for line in lines if line.startswith("dinov3_vitl16 ")]
    assert large == [
        "dinov3_vitl16",
        "303,154,176",
        "1024",
        "24",
        "16",
        "4",
        "ViT:",
        "16",
        "heads,",
        "mlp",
        "4096",
        "lvd1689m,",
        "sat493m",
    ]
    (huge,) = [line.split() for line in lines if line.startswith("dinov3_vit7b16 ")]
    assert huge[1:10] == ["6,716,043,264", "4096", "40", "16", "4", "ViT:", "32", "heads,", "swiglu"]
    (tiny,) = [line for line in lines if line.startswith("dinov3_convnext_tiny ")]
    assert tiny.split()[1:6] == ["27,820,128", "768", "4", "32", "0"]
    assert "ConvNeXt: blocks 3/3/9/3, channels 96/192/384/768" in tiny
    assert "small = dinov3_vits16" in lines[-1]


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("serve", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in SETTINGS:
        metavar = setting.type.metavar
        assert f"{setting.flag} {f'[{metavar}]' if setting.type is BOOLEAN else metavar} " in text
        assert setting.help in text
        if default := setting.show(setting.default):
            assert f"Default: {default}." in text
    for topic in ("network:", "security:", "logging:", "--config FILE"):
        assert topic in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("--version") == 0
    assert capsys.readouterr().out == f"dinov3-serving {importlib.metadata.version('dinov3-serving')}\n"


def test_config_and_models_import_nothing_heavy() -> None:
    code = (
        "import sys; from dinov3_server.cli import main\n"
        "assert main(['config']) == main(['models']) == 0\n"
        "heavy = {'torch', 'grpc', 'numpy', 'PIL', 'prometheus_client'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
