"""`dinov3-client fit-projection`: principal components in a file, and what a server makes of them."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from dinov3_client import Client
from dinov3_client.cli import main
from dinov3_client.testing import MODEL, FakeServer, expected
from tests.client.pictures.conftest import Run, pattern


def read(path: Path) -> tuple[Any, Any, dict[str, str]]:
    with safe_open(path, "np") as file:
        assert sorted(file.keys()) == ["bias", "weight"]
        weight, bias, metadata = file.get_tensor("weight"), file.get_tensor("bias"), file.metadata()
    assert (weight.dtype, bias.dtype) == (np.float32, np.float32)
    return weight, bias, metadata


def patches(seed: int, size: tuple[int, int] = (256, 256), **options: Any) -> Any:
    """As the client gets them of photo SEED."""
    height, width = size
    pixels = np.asarray(Image.fromarray(pattern(seed)).resize((width, height), Image.Resampling.BILINEAR))
    return expected(pixels, "patches", **options).astype(np.float16).astype(np.float64)


def components(tokens: Any, count: int) -> tuple[Any, Any]:
    """By numpy, of all tokens at once; and the share of the variance that the first 1, 2, ... of them have."""
    _, singular, directions = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])
    return (directions * signs[:, None])[:count], np.cumsum(singular**2) / np.sum(singular**2)


def test_the_file_holds_the_principal_components_of_all_patches(
    run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pca4.safetensors"
    assert run("fit-projection", photos, "-o", path, "--channels", "4") == 0
    weight, bias, metadata = read(path)
    tokens = np.concatenate([patches(seed) for seed in range(5)])
    wanted, explained = components(tokens, 4)
    assert weight.shape == (4, 24)
    assert np.abs(weight - wanted).max() < 1e-6
    assert np.allclose(tokens @ weight.T + bias, (tokens - tokens.mean(0)) @ wanted.T, atol=1e-5)
    assert metadata == {
        "model": "dinov3_vits16",
        "weights": "dinov3_vits16.pth",
        "fingerprint": "f00d",
        "images": "5",
        "patches": "1280",
        "explained_variance": f"{explained[3]:.6f}",
    }
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 4 of 24 channels, from 1,280 patches of 5 images",
        f"explained variance: 4 channels {explained[3]:.1%}",
        f"for the server:     --projections pca4={path}",
        'for the client:     projection="pca4"',
    ]


def test_a_server_projects_with_it(run: Run, photos: Path, tmp_path: Path) -> None:
    assert run("fit-projection", photos, "-o", tmp_path / "p.safetensors", "--channels", "3", "--size", "96x128") == 0
    weight, bias, _ = read(tmp_path / "p.safetensors")
    with FakeServer(projections={"p": (weight, bias)}) as server, Client(server.target) as client:
        given = [photos / f"photo{seed}.png" for seed in range(5)]
        features = client.extract(given, "patches", size=(96, 128), dtype="float32", projection="p")
        assert features.patches is not None
        projected = features.patches.astype(np.float64)
    whole = [expected(pattern(seed), "patches").astype(np.float64) for seed in range(5)]
    assert np.allclose(projected, np.stack(whole) @ weight.T.astype(np.float64) + bias, atol=1e-5)
    # What a projection on principal components is for: centered, without correlation, by falling variance.
    flat = projected.reshape(-1, 3)
    assert np.abs(flat.mean(0)).max() < 1e-3 * flat.std()
    correlation = np.corrcoef(flat.T)
    assert np.abs(correlation - np.eye(3)).max() < 1e-2
    assert (np.diff(flat.var(0)) < 0).all()


def test_layer_preset_size_and_exif(photos: Path, tmp_path: Path, turned: Path) -> None:
    other = replace(MODEL, layer_strides=(8,) + (16,) * 11, layer_dims=(18,) + (24,) * 11)
    path = tmp_path / "p.safetensors"
    with FakeServer(other) as server:
        options = ("--layer=-12", "--preset", "hf", "--channels", "2", "--target", server.target)
        assert main(["fit-projection", str(photos), "-o", str(path), *options]) == 0
        weight, _, metadata = read(path)
        tokens = np.concatenate([patches(seed, (224, 224), layer=0, model=other) for seed in range(5)])
        assert np.abs(weight - components(tokens, 2)[0]).max() < 1e-6
        assert (metadata["layer"], metadata["patches"]) == ("0", str(5 * 28 * 28))
        assert not any(request.outputs.patches for request in server.requests)
        options = ("--preset", "none", "--exif", "--channels", "2", "--target", server.target)
        assert main(["fit-projection", str(turned), str(photos), "-o", str(path), *options]) == 0
        asked = server.requests[-1].preprocessing
    assert asked.apply_exif_orientation
    upright = np.ascontiguousarray(np.rot90(pattern(0), -1))
    every = [upright, *map(pattern, range(5))]  # of two sizes in one request
    tokens = np.concatenate([expected(pixels, "patches").astype(np.float16).astype(np.float64) for pixels in every])
    assert np.abs(read(path)[0] - components(tokens, 2)[0]).max() < 1e-5


def test_a_repetition_writes_the_same_bytes(run: Run, photos: Path, tmp_path: Path) -> None:
    written = []
    for _ in range(2):
        assert run("fit-projection", photos, "-o", tmp_path / "p.safetensors", "--channels", "5") == 0
        written.append((tmp_path / "p.safetensors").read_bytes())
    assert written[0] == written[1]


def test_the_explained_variance_of_fewer_channels_is_printed(
    run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit-projection", photos, "-o", tmp_path / "p.safetensors", "--channels", "24") == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert re.fullmatch(r"explained variance: 8 channels \d+\.\d%, 16 channels \d+\.\d%, 24 channels 100\.0%", line)


def test_broken_images_are_named_and_the_others_count(
    run: Run, photos: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(broken, photos / "photo2.jpg")
    (photos / "photo9.jpg").symlink_to(tmp_path / "nowhere")  # the last of all
    missing = tmp_path / "none.png"
    alone = tmp_path / "alone.png"  # all of its source
    alone.symlink_to(tmp_path / "nowhere")
    path = tmp_path / "p.safetensors"
    assert run("fit-projection", missing, alone, photos, "-o", path, "--channels", "2") == 1
    errors = sorted(line.removeprefix("dinov3-client: ") for line in capsys.readouterr().err.splitlines())
    assert errors.pop(0) == f"{alone}: No such file or directory"
    assert errors[0].startswith(f"{photos}/photo2.jpg: the file of 10 bytes is of no known format")
    assert errors[1:] == [
        f"{photos}/photo9.jpg: No such file or directory",
        f"there is no file or folder {missing}",
    ]
    weight, _, metadata = read(path)
    assert metadata["images"] == "5"
    assert np.abs(weight - components(np.concatenate([patches(seed) for seed in range(5)]), 2)[0]).max() < 1e-6


def test_too_few_patches_give_no_projection(
    run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.safetensors"
    assert run("fit-projection", photos / "photo0.png", "-o", path, "--channels", "16", "--size", "64") == 1
    assert "1 images have 16 patches, too few for 16 principal components" in capsys.readouterr().err
    assert not path.exists()


def test_another_model_in_between_ends_it(
    server: FakeServer, run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(response: Any) -> None:
        response.fingerprint = "beef"

    server.edit = other
    assert run("fit-projection", photos, "-o", tmp_path / "p.safetensors", "--channels", "2") == 1
    assert "beef" in capsys.readouterr().err
    assert not (tmp_path / "p.safetensors").exists()


USAGE: list[tuple[tuple[str, ...], str]] = [
    (("-o", "p.safetensors", "--channels", "25"), "--channels 25: the patches have 24; allowed are 1 to 24"),
    (("-o", "p.safetensors", "--channels", "0"), "--channels 0: the patches have 24; allowed are 1 to 24"),
    (("-o", "p.safetensors", "--layer", "12"), "layer 12: dinov3_vits16 has the layers 0 to 11"),
    (("-o", "p.npy"), "p.npy: it must be NAME.safetensors, with a NAME of letters, digits, - and _"),
    (("-o", "a=b.safetensors"), "a=b.safetensors: it must be NAME.safetensors"),
    (("-o", "none/p.safetensors"), "there is no folder none"),
    ((), "-o/--output"),
]


@pytest.mark.parametrize(("args", "message"), USAGE, ids=[" ".join(args) for args, _ in USAGE])
def test_wrong_usage_exits_with_2(
    server: FakeServer, run: Run, photos: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as exited:
        run("fit-projection", photos, *args)
    assert exited.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not server.requests
