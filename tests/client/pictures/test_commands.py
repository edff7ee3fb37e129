"""`dinov3-client pca` and `similarity`, through `main`: what their pictures show."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from dinov3_client._pictures import sheet
from dinov3_client._pictures.colormap import magma
from dinov3_client.cli import main, pca
from dinov3_client.cli.pictures import input_size_for
from dinov3_client.testing import MODEL, Failure, FakeServer, expected
from tests.client.pictures.conftest import Run, cells, pattern, shown


def sizes(server: FakeServer) -> list[tuple[int, int]]:
    found = [request.preprocessing.size for request in server.requests]
    return [(size.height, size.width) for size in found]


def thumbnail(pixels: np.ndarray[Any, Any], width: int, height: int) -> Any:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("size", "photo", "patch", "height_width"),
    [
        (512, (640, 480), 16, (384, 512)),
        (512, (480, 640), 16, (512, 384)),
        (512, (500, 500), 16, (512, 512)),
        (512, (451, 300), 16, (336, 512)),
        (512, (451, 300), 32, (352, 512)),
        (512, (10_000, 3), 16, (16, 512)),
        ((384, 512), (300, 451), 16, (384, 512)),
    ],
)
def test_a_patch_covers_about_a_square_of_the_photo(
    size: int | tuple[int, int], photo: tuple[int, int], patch: int, height_width: tuple[int, int]
) -> None:
    assert input_size_for(size, photo, patch) == height_width


def test_pca_shows_photos_beside_their_maps(
    server: FakeServer, run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(photos / "photo0.png", tmp_path / "copy.png")
    picture = tmp_path / "pca.png"
    assert run("pca", photos / "photo0.png", photos / "photo1.png", tmp_path / "copy.png", "-o", picture) == 0
    assert capsys.readouterr().out == f"{picture}: 3 of 3 images\n"
    assert sizes(server) == [(384, 512)] * 3
    with Image.open(picture) as opened:
        assert opened.width == 24 + 320 + 8 + 320 + 24
    pairs = [shown(picture, pair) for pair in range(3)]
    for (photo, _), seed in zip(pairs, (0, 1, 0), strict=True):
        assert np.array_equal(photo, thumbnail(pattern(seed), 320, 240))
    first, second, copy = (map_ for _, map_ in pairs)
    assert np.array_equal(first, copy)  # one basis and one scale: equal images look equal
    assert np.abs(first - second).mean() > 10
    for each in (first, second):
        blocks = each.reshape(24, 10, 32, 10, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()  # a patch is one flat square of 10 pixels
        assert each.std(axis=(0, 1)).min() > 20  # all three components show


def test_pca_colors_are_the_principal_components_of_all(run: Run, photos: Path, tmp_path: Path) -> None:
    picture = tmp_path / "pca.png"
    assert run("pca", photos, "-o", picture, "--size", "128") == 0
    every = [expected(pattern(seed), "patches").astype(np.float16).astype(np.float64) for seed in range(5)]
    tokens = np.concatenate(every)
    _, _, directions = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    signs = [np.sign(row[np.abs(row).argmax()]) for row in directions[:3]]
    projected = (tokens - tokens.mean(0)) @ (directions[:3] * np.array(signs)[:, None]).T
    low, high = np.percentile(projected, [1, 99], axis=0)
    rgb = ((projected - low) / (high - low)).clip(0, 1) * 255
    with Image.open(picture) as opened:  # of two columns
        drawn = np.asarray(opened).astype(int)
    for index, colors in enumerate(np.split(rgb, 5)):
        top, left = 24 + 26 + index // 2 * (240 + 50), 24 + 328 + index % 2 * (648 + 24)
        found = cells(drawn[top : top + 240, left : left + 320], (6, 8))
        assert np.abs(found - colors.reshape(6, 8, 3)).max() <= 1


def test_pca_of_many_photos_is_several_sheets_of_one_scale(
    run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheet, "PAIRS", 2)
    shutil.copy(photos / "photo0.png", photos / "photo4.png")
    assert run("pca", photos, "-o", tmp_path / "pca.png", "--size", "64") == 0
    assert capsys.readouterr().out == f"{tmp_path}/pca-1.png to {tmp_path}/pca-3.png: 5 of 5 images\n"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["pca-1.png", "pca-2.png", "pca-3.png"]
    first, last = shown(tmp_path / "pca-1.png", 0), shown(tmp_path / "pca-3.png", 0)
    assert np.array_equal(first, last)
    assert not np.array_equal(first, shown(tmp_path / "pca-1.png", 1))


def test_pca_leaves_nothing_beside_the_picture(run: Run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert run("pca", photos, "-o", out / "pca.png", "--size", "64") == 0
    assert [path.name for path in out.iterdir()] == ["pca.png"]


def test_pca_takes_the_scale_of_many_patches_from_some(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = []
    for sample in (1 << 20, 1000):
        monkeypatch.setattr(pca, "SAMPLE", sample)
        assert run("pca", photos / "photo0.png", photos / "photo1.png", "-o", tmp_path / "pca.png") == 0
        pictures.append(shown(tmp_path / "pca.png", 1)[1])
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 5


def test_pca_of_a_layer_has_the_grid_of_the_layer(photos: Path, tmp_path: Path) -> None:
    finer = replace(MODEL, layer_strides=(8,) + (16,) * 11, layer_dims=(18,) + (24,) * 11)
    with FakeServer(finer) as server:
        for layer, side in ((-12, 5), (3, 10)):
            picture = tmp_path / f"{layer}.png"
            args = ("pca", photos / "photo0.png", "-o", picture, f"--layer={layer}", "--target", server.target)
            assert main([*map(str, args)]) == 0
            blocks = shown(picture, 0)[1].reshape(240 // side, side, 320 // side, side, 3)
            assert (blocks == blocks[:, :1, :, :1]).all()
            assert (blocks[::2] != blocks[1::2]).any()  # no coarser than that
        outputs = [request.outputs for request in server.requests]
    assert [[layer.layer for layer in each.layers] for each in outputs] == [[0], [3]]
    assert not any(each.patches for each in outputs)  # those of the last layer stay there


def test_pca_leaves_broken_images_out(
    run: Run, photos: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes((photos / "photo0.png").read_bytes()[:2000])
    ppm = tmp_path / "a.ppm"
    Image.fromarray(pattern(1)).save(ppm)
    missing = tmp_path / "missing.jpg"
    sources = (broken, cut, ppm, missing, photos / "photo0.png")
    assert run("pca", *sources, "-o", tmp_path / "pca.jpg", "--size", "64x128") == 1
    captured = capsys.readouterr()
    assert [line.split(": ")[1:3] for line in captured.err.splitlines()] == [
        [str(broken), "not an image"],
        [str(cut), "cannot be decoded"],
        [str(ppm), captured.err.splitlines()[2].split(": ")[2]],  # as the server has it
        [f"there is no file or folder {missing}"],
    ]
    assert captured.out == f"{tmp_path}/pca.jpg: 1 of 5 images\n"
    with Image.open(tmp_path / "pca.jpg") as picture:
        assert (picture.format, picture.width) == ("JPEG", 696)
    assert run("pca", broken, "-o", tmp_path / "none.png") == 1
    assert "no image left to draw" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_a_photo_that_the_server_refuses_is_left_out(
    server: FakeServer, run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it is the request's fault or the image's: there is one image in a request."""
    server.model = replace(MODEL, limits=replace(MODEL.limits, max_image_tokens=300))
    Image.fromarray(pattern(7, 40, 128)).save(photos / "wide.png")
    assert run("pca", photos, "-o", tmp_path / "pca.png", "--size", "320") == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in errors] == [str(photos / f"photo{index}.png") for index in range(5)]
    assert np.array_equal(shown(tmp_path / "pca.png", 0, (100, 320))[0], thumbnail(pattern(7, 40, 128), 320, 100))


def test_pca_turns_photos_as_the_model_sees_them(server: FakeServer, run: Run, turned: Path, tmp_path: Path) -> None:
    heights = []
    for options in ((), ("--exif",)):
        assert run("pca", turned, "-o", tmp_path / "pca.png", *options) == 0
        with Image.open(tmp_path / "pca.png") as picture:
            heights.append(picture.height)
    assert sizes(server) == [(384, 512), (512, 384)]
    assert [request.preprocessing.apply_exif_orientation for request in server.requests] == [False, True]
    assert heights[1] - heights[0] == 320 - 240


def test_photos_of_16_bits_are_not_shown_white(run: Run, tmp_path: Path) -> None:
    gray = np.tile(np.linspace(0, 65535, 128).astype(np.uint16), (96, 1))
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert run("pca", tmp_path / "gray.png", "-o", tmp_path / "pca.png") == 0
    photo, _ = shown(tmp_path / "pca.png", 0)
    assert np.abs(photo[:, :, 0].mean(0) - np.linspace(0, 255, 320)).max() < 4


def test_photos_are_drawn_however_large(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 128 // 4)
    assert run("pca", photos / "photo0.png", "-o", tmp_path / "pca.png", "--size", "64") == 0


def own_cosines(token: Any, seed: int) -> Any:
    tokens = expected(pattern(seed), "patches").astype(np.float16).astype(np.float64)
    return (tokens @ token / np.linalg.norm(token) / np.linalg.norm(tokens, axis=1)).reshape(6, 8)


@pytest.mark.parametrize("at", ["70,50", "0.55,0.53"])
def test_similarity_shows_the_cosine_with_the_patch_at_the_point(
    run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    picture = tmp_path / "s.png"
    others = (photos / "photo1.png", photos / "photo2.png")
    assert run("similarity", photos / "photo0.png", "--at", at, "--other", *others, "-o", picture, "--size", "128") == 0
    token = expected(pattern(0), "patches").astype(np.float16).astype(np.float64).reshape(6, 8, -1)[3, 4]
    maps = [own_cosines(token, seed) for seed in range(3)]
    least = min(each.min() for each in maps)
    assert capsys.readouterr().out == f"{picture}: 3 of 3 images, cosines from {least:.3g}\n"
    with Image.open(picture) as opened:
        bar = np.asarray(opened).astype(int)[24 + 3 * (240 + 26 + 24) + 26 + 7, 24 : 24 + 648]
    low = np.floor(least * 10) / 10  # a tenth is the step of the legend for cosines from 0 on
    assert low >= 0
    for index, cosines in enumerate(maps):
        photo, map_ = shown(picture, index)
        found = cells(map_, (6, 8))
        assert np.abs(found - magma((cosines - low) / (1 - low))).max() <= 1
        original = thumbnail(pattern(index), 320, 240)
        changed = np.argwhere((photo != original).any(-1))
        if index:
            assert not len(changed)
        else:  # the ring is around the point, on the photo and on the map
            assert np.abs(changed.mean(0) - [(50.5) / 96 * 240, 70.5 / 128 * 320]).max() < 1.5
            assert np.ptp(changed, axis=0).max() <= 25
            assert np.array_equal(found[3, 4], bar[-1])  # itself: cosine 1, the legend's right end
            assert len(np.unique(map_[120:160, 160:200].reshape(-1, 3), axis=0)) > 2
    assert np.array_equal(bar, magma(np.linspace(0, 1, 648)))


def test_similarity_of_one_flat_picture(run: Run, tmp_path: Path) -> None:
    """All patches alike: no range to divide by."""
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "flat.png")
    assert run("similarity", tmp_path / "flat.png", "--at", "0,0", "-o", tmp_path / "s.png", "--size", "64") == 0
    found = cells(shown(tmp_path / "s.png", 0, (320, 320))[1], (4, 4))
    assert (found[1:] == magma(np.array(1.0))).all()


def test_similarity_takes_the_point_of_the_upright_photo(
    run: Run, turned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "s.png"
    assert run("similarity", turned, "--at", "40,120", "-o", picture, "--exif", "--size", "128") == 0
    _, map_ = shown(picture, 0, (320, 240))
    assert np.array_equal(cells(map_, (8, 6))[7, 2], magma(np.array(1.0)))
    with pytest.raises(SystemExit, match="2"):
        run("similarity", turned, "--at", "40,120", "-o", picture, "--size", "128")
    assert f"--at lies outside {turned}: of 128 x 96 pixels, X is 0 to 127 and Y is 0 to 95" in capsys.readouterr().err


def test_similarity_without_its_image_is_nothing(
    server: FakeServer, run: Run, photos: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in (broken, tmp_path / "none.png", photos):
        assert run("similarity", image, "--at", "0,0", "--other", photos, "-o", tmp_path / "s.png") == 1
        said, without = capsys.readouterr().err.splitlines()
        assert said.startswith(f"dinov3-client: {image}: ")
        assert without == f"dinov3-client: without {image} there is nothing to compare with"
    assert not server.requests
    assert not (tmp_path / "s.png").exists()


def test_similarity_leaves_broken_others_out(
    run: Run, photos: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = ("--other", broken, "--other", photos / "photo1.png")
    assert run("similarity", photos / "photo0.png", "--at", "0,0", *others, "-o", tmp_path / "s.png") == 1
    captured = capsys.readouterr()
    assert f"{broken}: not an image: 10 bytes" in captured.err
    assert captured.out.startswith(f"{tmp_path}/s.png: 2 of 3 images, ")


USAGE: list[tuple[list[str], str]] = [
    (["pca", "a.png"], "-o/--output"),
    (["pca", "-o", "pca.png"], "SOURCE"),
    (["pca", "{0}", "-o", "pca.png", "--layer", "12"], "layer 12: dinov3_vits16 has the layers 0 to 11"),
    (["pca", "{0}", "-o", "pca.png", "--size", "500"], "500 is no multiple of the model's patch size, 16; 496 and 512"),
    (["pca", "{0}", "-o", "pca.png", "--size", "64x8"], "8 is no multiple of the model's patch size, 16; 16 is"),
    (["pca", "{0}", "-o", "pca.txt"], "pca.txt: its extension is not of a writable image format, such as .png"),
    (["pca", "{0}", "-o", "no/such/folder/pca.png"], "there is no folder no/such/folder"),
    (["similarity", "{0}", "-o", "s.png"], "--at"),
    (
        ["similarity", "{0}", "--at", "1,0.5", "-o", "s.png"],
        "'1,0.5' is not a point, such as 320,200 (pixels) or 0.5,0.3",
    ),
    (["similarity", "{0}", "--at=-1,3", "-o", "s.png"], "of 128 x 96 pixels, X is 0 to 127 and Y is 0 to 95"),
    (["similarity", "{0}", "--at", "1.5,0.5", "-o", "s.png"], "fractions are 0.0 to 1.0"),
    (["similarity", "{0}", "--at", "0,0", "-o", "s.png", "--other", *["{0}"] * 24], "give at most 23 to --other"),
]


@pytest.mark.parametrize(("args", "message"), USAGE, ids=[" ".join(args[:5]) for args, _ in USAGE])
def test_wrong_usage_exits_with_2(
    run: Run,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        run(*(arg.format(photos / "photo0.png") for arg in args))
    assert exited.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("command", [("pca",), ("similarity", "--at", "0,0")])
def test_a_failing_server_ends_the_command(
    server: FakeServer,
    run: Run,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
) -> None:
    server.script = [Failure(grpc.StatusCode.UNAUTHENTICATED, "this server wants a token")]
    assert run(*command, photos / "photo0.png", "-o", tmp_path / "p.png") == 1
    assert capsys.readouterr().err.startswith("dinov3-client: this server wants a token: give the server's token by --")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_the_caption_describes_the_picture(
    server: FakeServer, run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, sheet.Legend | None]] = []
    names: list[list[str]] = []
    draw = sheet.draw

    def spy(pairs: Any, caption: str, legend: sheet.Legend | None) -> Image.Image:
        said.append((caption, legend))
        names.append([pair.name for pair in pairs])
        return draw(pairs, caption, legend)

    monkeypatch.setattr(sheet, "draw", spy)
    first = (photos / "photo0.png", "-o", tmp_path / "p.png")
    assert run("pca", *first, "--layer=-9") == 0
    server.model = replace(MODEL, random_weights=True)
    shutil.copytree(photos, photos / "more")
    assert run("similarity", *first, "--at", "0,0", "--other", photos) == 0
    assert names[0] == ["photo0.png"]
    assert names[1] == ["photo0.png", *(f"{folder}photo{n}.png" for folder in ("more/", "") for n in range(5))]
    components = "principal components 1-3 of the patches as red, green and blue; 100% of the variance"
    assert said[0] == (f"dinov3_vits16, layer 3: {components}", None)
    caption, legend = said[1]
    assert caption.startswith("dinov3_vits16 (random weights); one scale for all images, least cosine ")
    assert legend is not None
    assert legend.title == "Cosine with the patch in the ring"
    assert legend.ticks[0] <= float(caption.rpartition(" ")[2]) < legend.ticks[1]
    assert legend.ticks[-1] == 1.0
