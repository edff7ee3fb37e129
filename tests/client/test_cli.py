"""The commands, end to end through `main`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from dinov3_client.cli import main
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.client.fake_server import FakeServer, failure, layer_scale, tokens


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
    ):
        assert text in out
    assert "random" not in out


def test_info_tells_whether_the_features_are_proven(capsys: pytest.CaptureFixture[str]) -> None:
    proofs = [
        pb.OutputProof(output=output, dtype=dtype, least_cosine=cosine)
        for dtype, cosine in ((pb.DATA_TYPE_FLOAT32, 0.999999), (pb.DATA_TYPE_BFLOAT16, 0.998))
        for output in ("cls", "patches")
    ]
    proven = pb.Certificate(verified=True, upstream_revision="6876159a11b4df11", outputs=proofs)
    for certificate, line in (
        (
            proven,
            "verified against Meta's code at 6876159a11b4: cls cosine 0.998000, patches cosine 0.998000 in bfloat16",
        ),
        (pb.Certificate(reason="offline"), "not verified: offline"),
        (None, "not verified: the server tells of no proof"),
    ):
        with FakeServer(certificate=certificate) as server:
            assert run(server, "info") == 0
        assert f"certificate  {line}\n" in capsys.readouterr().out


def test_random_weights_are_said(capsys: pytest.CaptureFixture[str], photos: list[Path], tmp_path: Path) -> None:
    with FakeServer(random_weights=True) as server:
        assert run(server, "info") == 0
        assert "random:7 (random: features have no meaning)" in capsys.readouterr().out
        assert run(server, "extract", photos[0], "--out", tmp_path) == 0
        assert "weights are random (random:7)" in capsys.readouterr().err


def test_target_from_the_environment(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_TARGET", server.target)
    monkeypatch.setenv("DINOV3_TOKEN", "abc")
    assert main(["info"]) == 0
    assert server.seen[0].metadata["authorization"] == "Bearer abc"


def test_token_file(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    assert run(server, "info", "--token-file", tmp_path / "token") == 0
    assert server.seen[0].metadata["authorization"] == "Bearer from-a-file"


def test_extract_writes_what_was_asked_for(
    server: FakeServer, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "features"
    options = (
        "--outputs",
        "cls,registers,patches",
        "--preset",
        "none",
        "--dtype",
        "float32",
        "--layers=-1,0",
        "--exif",
    )
    assert run(server, "extract", *photos, "--out", out, *options) == 0
    assert capsys.readouterr().out == f"5 of 5 images written to {out}\n"
    assert sorted(path.name for path in out.iterdir()) == [f"photo{index}.npz" for index in range(5)]
    for index, path in enumerate(photos):
        with np.load(out / f"photo{index}.npz") as file:
            for prefix, layer, scale in (
                ("", -1, 1.0),
                ("layer11_", 11, layer_scale(11)),
                ("layer0_", 0, layer_scale(0)),
            ):
                for kind, expected in tokens(pattern(index), layer).items():
                    assert np.array_equal(file[prefix + kind], (expected * scale).astype(np.float32))
                assert file[f"{prefix}grid"].tolist() == ([12, 16] if layer == 0 else [6, 8])
            assert file["input_size"].tolist() == [96, 128]
            said = {key: str(file[key]) for key in ("preset", "source", "model", "weights", "fingerprint", "exif")}
            assert len(file.files) == 3 * 4 + 1 + 6
        assert said == {
            "preset": "none",
            "source": str(path),
            "model": "dinov3_vits16",
            "weights": "dinov3_vits16.pth",
            "fingerprint": "f00d",
            "exif": "True",
        }
    assert server.requests[0].preprocessing.apply_exif_orientation


def test_extract_defaults_and_size(server: FakeServer, photos: list[Path], tmp_path: Path) -> None:
    assert run(server, "extract", photos[0], "--out", tmp_path, "--size", "32x64") == 0
    with np.load(tmp_path / "photo0.npz") as file:
        assert {"cls", "patches"} <= set(file.files)
        assert "registers" not in file.files
        assert (file["patches"].shape, file["patches"].dtype) == ((8, 24), np.float16)


def test_broken_images_are_named_and_the_others_written(
    server: FakeServer, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, folder, missing = tmp_path / "broken.jpg", tmp_path / "folder", tmp_path / "missing.jpg"
    broken.write_bytes(b"no picture")
    folder.mkdir()
    out = tmp_path / "out"
    assert run(server, "extract", photos[0], broken, folder, photos[1], missing, "--out", out) == 1
    captured = capsys.readouterr()
    assert sorted(captured.err.splitlines()) == [
        f"dinov3-client: {broken}: not an image: 10 bytes",
        f"dinov3-client: {folder}: Is a directory",
        f"dinov3-client: {missing}: No such file or directory",
    ]
    assert captured.out == f"2 of 5 images written to {out}\n"
    assert sorted(path.name for path in out.iterdir()) == ["photo0.npz", "photo1.npz"]
    with np.load(out / "photo1.npz") as file:
        assert str(file["source"]) == str(photos[1])
        expected = tokens(np.asarray(Image.fromarray(pattern(1)).resize((256, 256), Image.Resampling.BILINEAR)))
        assert np.array_equal(file["cls"], expected["cls"].astype(np.float16))


def test_requests_stay_below_the_servers_limits(photos: list[Path], tmp_path: Path) -> None:
    def counts(*options: str, **limits: int) -> list[int]:
        with FakeServer(**limits) as server:  # type: ignore[arg-type]
            assert run(server, "extract", *photos, "--out", tmp_path, *options) == 0
            return [len(request.images) for request in server.requests]

    assert counts() == [5]
    assert counts(max_images=2) == [2, 2, 1]
    # The answer: 257 tokens of 24 float16 channels an image, 12,336 bytes, besides the 64 KiB kept free.
    assert counts(max_message_bytes=(64 << 10) + 3 * 12_336) == [3, 2]
    assert counts("--dtype", "float32", max_message_bytes=(64 << 10) + 3 * 12_336) == [1] * 5
    assert counts("--layers", "3,4", max_message_bytes=(64 << 10) + 6 * 12_336) == [2, 2, 1]
    # Layer 0 has 1,025 tokens of 18 channels.
    assert counts("--layers", "0", max_message_bytes=(64 << 10) + 2 * (12_336 + 36_900)) == [2, 2, 1]
    assert counts("--layers", "0", max_message_bytes=(64 << 10) + 2 * (12_336 + 36_900) - 1) == [1] * 5
    # The request.
    two = sum(path.stat().st_size for path in photos[:2])
    assert counts("--outputs", "cls", max_message_bytes=(64 << 10) + two)[0] == 2
    # Without a preset nobody knows the size of an answer before.
    assert counts("--preset", "none") == [1] * 5
    assert counts("--preset", "none", "--size", "64") == [5]


def test_a_file_over_the_limit_fails_alone(
    photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tmp_path / "large.bmp"
    large.write_bytes(bytes(300_000))
    with FakeServer(max_message_bytes=200_000) as server:
        assert run(server, "extract", large, photos[0], "--out", tmp_path) == 1
    assert f"{large}: 300000 bytes are over the server's limit of 134464" in capsys.readouterr().err
    assert (tmp_path / "photo0.npz").exists()


def test_images_never_share_an_npz(
    server: FakeServer, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "photo0.jpg"
    Image.fromarray(pattern(7)).save(other)
    with pytest.raises(SystemExit) as exited:
        run(server, "extract", photos[0], other, "--out", tmp_path / "out")
    assert exited.value.code == 2
    assert f"{photos[0]} and {other} would both become {tmp_path / 'out' / 'photo0.npz'}" in capsys.readouterr().err
    assert not server.seen
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_older_file(
    server: FakeServer, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(server, "extract", photos[0], "--out", out) == 0
    before = (out / "photo0.npz").read_bytes()

    def full(file: Any, **_: object) -> None:
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert run(server, "extract", photos[0], "--out", out) == 1
    assert [path.name for path in out.iterdir()] == ["photo0.npz"]
    assert (out / "photo0.npz").read_bytes() == before


def test_pca_shows_photos_beside_their_maps(
    server: FakeServer, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes(photos[0].read_bytes())
    picture = tmp_path / "pca.png"
    assert run(server, "pca", photos[0], photos[1], copy, "-o", picture) == 0
    assert capsys.readouterr().out == f"{picture}: 3 of 3 images, 696x920\n"
    assert [request.preprocessing.size.height for request in server.requests] == [512]
    with Image.open(picture) as opened:
        sheet = np.asarray(opened).astype(int)
    assert sheet.shape == (920, 696, 3)
    # Pairs of 320 x 240 below each other, each under its label.
    tops = [24 + 26 + index * (240 + 26 + 24) for index in range(3)]
    shown = [sheet[top : top + 240, 24:344] for top in tops]
    maps = [sheet[top : top + 240, 352:672] for top in tops]
    for found, seed in zip(shown, (0, 1, 0), strict=True):
        photo = Image.fromarray(pattern(seed)).resize((320, 240), Image.Resampling.LANCZOS)
        assert np.array_equal(found, np.asarray(photo))
    assert np.array_equal(maps[0], maps[2])  # one basis and one scale: equal images look equal
    assert np.abs(maps[0] - maps[1]).mean() > 10
    for each in maps:
        cells = each[:240, :320].reshape(240, 32, 10, 3)
        assert (cells == cells[:, :, :1]).all()  # a patch is one flat cell, 10 pixels wide
        assert each.std(axis=(0, 1)).min() > 20  # all three components show


def test_pca_of_a_layer_has_the_grid_of_the_layer(server: FakeServer, photos: list[Path], tmp_path: Path) -> None:
    for layer, cells in ((-12, 64), (3, 32)):
        picture = tmp_path / f"{layer}.png"
        assert run(server, "pca", photos[0], "-o", picture, f"--layer={layer}") == 0
        with Image.open(picture) as opened:
            shown = np.asarray(opened)[50 : 50 + 240, 352:672]
        side = 320 // cells
        blocks = shown.reshape(240, cells, side, 3)
        assert (blocks == blocks[:, :, :1]).all()
        assert (blocks[:, ::2] != blocks[:, 1::2]).any()  # no coarser than that
    assert [layer.layer for request in server.requests for layer in request.outputs.layers] == [0, 3]


def test_pca_leaves_broken_images_out(
    server: FakeServer, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    assert run(server, "pca", broken, photos[0], "-o", tmp_path / "pca.jpg", "--size", "64x128") == 1
    assert "broken.jpg: not an image" in capsys.readouterr().err
    with Image.open(tmp_path / "pca.jpg") as picture:
        assert (picture.format, picture.width) == ("JPEG", 696)
    assert run(server, "pca", broken, "-o", tmp_path / "none.png") == 1
    assert "no image left to draw" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_pca_turns_photos_as_the_model_sees_them(server: FakeServer, tmp_path: Path) -> None:
    image = Image.fromarray(pattern(0))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    sizes = []
    for options in ((), ("--exif",)):
        assert run(server, "pca", tmp_path / "turned.png", "-o", tmp_path / "pca.png", *options) == 0
        with Image.open(tmp_path / "pca.png") as picture:
            sizes.append(picture.height)
    assert sizes == [240 + 100, 320 + 100]


USAGE: list[tuple[list[str], str]] = [
    ([], "COMMAND"),
    (["extract", "a.jpg"], "--out"),
    (["extract", "--out", "x"], "IMAGE"),
    (["extract", "a.jpg", "--out", "x", "--preset", "imagenet"], "invalid choice: 'imagenet'"),
    (["extract", "a.jpg", "--out", "x", "--size", "0"], "'0' is no size; 512 and 384x512 (height x width) are"),
    (["extract", "a.jpg", "--out", "x", "--size", "4294967296"], "'4294967296' is no size"),
    (["info", "--target", "http://localhost:50051"], "target is 'http://localhost:50051'; it must be HOST:PORT"),
    (["extract", "a.jpg", "--out", "x", "--size", "1x2x3"], "'1x2x3' is no size"),
    (["extract", "a.jpg", "--out", "x", "--outputs", "cls,tokens"], "'tokens' is no output; cls, patches and"),
    (["extract", "a.jpg", "--out", "x", "--layers", "one"], "'one' is no list of layers; 3,7,-1 is one"),
    (["extract", "a.jpg", "--out", "x", "--layers", "12"], "layer 12: dinov3_vits16 has the layers 0 to 11"),
    (["extract", "a.jpg", "--out", "x", "--dtype", "bfloat16"], "invalid choice: 'bfloat16'"),
    (["info", "--deadline", "-3"], "'-3' is no positive number of seconds"),
    (["info", "--deadline", "soon"], "'soon' is no positive number of seconds"),
    (["pca", "a.jpg", "-o", "pca.png", "--layer", "12"], "layer 12: dinov3_vits16 has the layers 0 to 11"),
    (["pca", "a.jpg", "-o", "pca.txt"], "-o pca.txt: its ending names no image format to write; .png does"),
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


@pytest.mark.parametrize("command", ["info", "extract", "pca"])
def test_failures_are_one_line_and_exit_with_1(
    server: FakeServer, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    args = {"info": (), "extract": (photos[0], "--out", tmp_path), "pca": (photos[0], "-o", tmp_path / "p.png")}
    server.script = [failure(grpc.StatusCode.UNAUTHENTICATED, "this server wants a token")]
    assert run(server, command, *args[command]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "dinov3-client: this server wants a token\n")


def test_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--target", f"unix:{tmp_path}/none", "--deadline", "0.05"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"dinov3-client: cannot reach unix:{tmp_path}/none in plain text (is it up, and without TLS?): "
    )


def test_missing_token_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--token-file", str(tmp_path / "none")]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_token_file_that_holds_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_bytes(b"\xff\x00")
    with pytest.raises(SystemExit, match="2"):
        main(["info", "--token-file", str(tmp_path / "token")])
    assert f"--token-file {tmp_path}/token: it holds no token" in capsys.readouterr().err


def test_pca_draws_what_the_server_takes_however_large(
    server: FakeServer, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 128 // 4)
    assert run(server, "pca", photos[0], "-o", tmp_path / "pca.png", "--size", "64") == 0


def test_interrupt(server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dinov3_client._client.Client.model", interrupt)
    assert run(server, "info") == 130
    assert capsys.readouterr().err == "dinov3-client: interrupted\n"


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
