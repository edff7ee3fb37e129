"""The commands, end to end through `main`."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from dinov3_client import OutputParity, ParityCheck
from dinov3_client._transport import retry
from dinov3_client.cli import main
from dinov3_client.testing import MODEL, Failure, FakeServer

HERE = Path(__file__).parent


def pattern(seed: int, height: int = 96, width: int = 128) -> np.ndarray[Any, Any]:
    """Smooth enough to survive resizing, different for each seed."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * (c + 1) + y * (seed + 1)) / 40 + c) for c in range(3)]
    return np.uint8(127 + 120 * np.stack(waves, -1))


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"photo{index}.png" for index in range(5)]
    for index, path in enumerate(paths):
        Image.fromarray(pattern(index)).save(path)
    return paths


def run(server: FakeServer, *args: object) -> int:
    return main([*map(str, args), "--target", server.target])


def test_info(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "info") == 0
    out = capsys.readouterr().out
    for text in (
        "dinov3_vits16",
        "f00d",
        "21,601,152",
        "18/24 channels, 12 layers, patch 8/16, 4 registers",
        "bfloat16",
        "presets      dinov3 256x256 bilinear, hf 224x224 bilinear, none (pixels as they are)\n",
    ):
        assert text in out
    assert "random" not in out


def test_info_shows_the_parity_check(capsys: pytest.CaptureFixture[str]) -> None:
    proofs = [
        OutputParity(output, dtype, cosine, 0.01)
        for dtype, cosine in (("float32", 0.999999), ("bfloat16", 0.998))
        for output in ("cls", "patches")
    ]
    proven = ParityCheck(True, "", "6876159a11b4df11", tuple(proofs), "2026-01-02T03:04:05Z", "")
    for check, line in (
        (
            proven,
            "verified against Meta's code at 6876159a11b4: cls cosine 0.998000, patches cosine 0.998000 in bfloat16",
        ),
        (ParityCheck(False, "offline", "", (), "", ""), "not verified: offline"),
    ):
        with FakeServer(replace(MODEL, parity_check=check)) as server:
            assert run(server, "info") == 0
        assert f"parity check {line}\n" in capsys.readouterr().out


def test_random_weights_are_noted(capsys: pytest.CaptureFixture[str], photos: list[Path], tmp_path: Path) -> None:
    with FakeServer(replace(MODEL, weights="random:7", random_weights=True)) as server:
        assert run(server, "info") == 0
        assert "random:7 (random: the features are meaningless)" in capsys.readouterr().out
        assert run(server, "extract", photos[0], "--out", tmp_path) == 0
        assert "weights are random (random:7)" in capsys.readouterr().err


def test_target_from_the_environment(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_TARGET", server.target)
    monkeypatch.setenv("DINOV3_TOKEN", "abc")
    assert main(["info"]) == 0
    assert server.calls[0].metadata["authorization"] == "Bearer abc"


def test_token_file(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    assert run(server, "info", "--token-file", tmp_path / "token") == 0
    assert server.calls[0].metadata["authorization"] == "Bearer from-a-file"


USAGE: list[tuple[list[str], str]] = [
    ([], "COMMAND"),
    (["info", "--target", "http://localhost:50051"], "--target is 'http://localhost:50051'; it must be HOST:PORT"),
    (["info", "--deadline", "-3"], "'-3' is not a positive number of seconds"),
    (["info", "--deadline", "soon"], "'soon' is not a positive number of seconds"),
    (["pca", "a.jpg", "-o", "pca.png", "--layer", "12"], "layer 12: dinov3_vits16 has the layers 0 to 11"),
    (["pca", "a.jpg", "-o", "no/such/folder/pca.png"], "there is no folder no/such/folder"),
]


@pytest.mark.parametrize(("args", "message"), USAGE, ids=[" ".join(args) for args, _ in USAGE])
def test_wrong_usage_exits_with_2(
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("DINOV3_TARGET", server.target)
    with pytest.raises(SystemExit) as exited:
        main(args)
    assert exited.value.code == 2
    assert message in capsys.readouterr().err
    assert not server.requests


def test_a_token_that_cannot_be_sent_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_TOKEN", "two words")
    with pytest.raises(SystemExit, match="2"):
        main(["info"])


@pytest.mark.parametrize("command", ["info", "pca"])
def test_failures_are_one_line_and_exit_with_1(
    server: FakeServer, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    args = {"info": (), "pca": (photos[0], "-o", tmp_path / "p.png")}
    server.model_script = [Failure(grpc.StatusCode.UNAUTHENTICATED, "this server wants a token: send the metadata `x`")]
    assert run(server, command, *args[command]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (
        "",
        "dinov3-client: this server wants a token: give the server's token by --token-file FILE or by the environment "
        "variable DINOV3_TOKEN\n",
    )


def test_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE"):  # no time for a second attempt
        monkeypatch.setattr(retry, name, 3600.0)
    assert main(["info", "--target", f"unix:{tmp_path}/none", "--deadline", "60"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"dinov3-client: cannot reach unix:{tmp_path}/none in plain text (is it up, and without TLS?): "
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tls-ca", HERE / "client.pem"],
            "with TLS: its certificate is not trusted (self signed certificate); --tls-ca",
        ),
        ([], "in plain text (is it up, and without TLS?)"),
    ],
)
def test_a_failure_of_tls_is_one_line(flags: list[Any], message: str) -> None:
    pair = (HERE / "localhost.key").read_bytes(), (HERE / "localhost.pem").read_bytes()
    credentials = grpc.ssl_server_credentials([pair])
    with FakeServer(address="localhost:0", credentials=credentials) as server:
        command = [
            sys.executable,
            "-c",
            "from dinov3_serving.client_command import main; exit(main())",
            "info",
            "--deadline",
            "2",
            "--target",
            server.target,
        ]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    *retries, line = done.stderr.splitlines()
    assert line.startswith(f"dinov3-client: cannot reach {server.target} {message}")
    assert all(retry.startswith(f"cannot reach {server.target}") for retry in retries), "nothing of gRPC's own log"


def test_wrong_arguments_are_named_as_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", "--target", "nowhere"])
    assert "error: --target is 'nowhere'; it must be HOST:PORT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["info", "--tls-cert", str(HERE / "client.pem")])
    assert "--tls-cert is given without --tls-key; a client certificate needs both" in capsys.readouterr().err


def test_the_http_port_is_no_grpc_port(capsys: pytest.CaptureFixture[str]) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        assert main(["info", "--target", f"127.0.0.1:{http.server_port}", "--deadline", "0.2"]) == 1
        http.shutdown()
        thread.join()
    error = capsys.readouterr().err
    assert "something answers, but does not speak gRPC; if this is the server's HTTP port" in error


def test_missing_token_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--token-file", str(tmp_path / "none")]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_a_token_file_without_a_valid_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_bytes(b"\xff\x00")
    with pytest.raises(SystemExit, match="2"):
        main(["info", "--token-file", str(tmp_path / "token")])
    assert f"--token-file {tmp_path}/token: a token has ASCII characters only" in capsys.readouterr().err


def test_imports_neither_torch_nor_the_server() -> None:
    code = (
        "import sys, dinov3_client, dinov3_client.cli\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'dinov3_server', 'transformers'}))"
    )
    path = [each for each in sys.path if each]
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
