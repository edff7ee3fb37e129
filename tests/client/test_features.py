"""Views, poolings, projections, layouts and int8: what comes back, row by row and packed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3_client import (
    Client,
    Features,
    ImageViews,
    InvalidRequest,
    Layer,
    MixedSizes,
    Pooling,
    View,
)
from dinov3_client.testing import MODEL, FakeServer, expected
from tests.support.waiting import LIMIT

Array = np.ndarray[Any, Any]
WEIGHT = np.random.default_rng(3).normal(size=(5, 24))
KINDS: Any = ("cls", "patches", "registers")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(projections={"narrow": WEIGHT}) as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, deadline=LIMIT) as client:
        yield client


def photo(height: int = 64, width: int = 96, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def seen(pixels: Array, view: View, size: tuple[int, int]) -> Array:
    """The pixels of a view, by Pillow."""
    image = Image.fromarray(pixels)
    if view.crop:
        top, left, height, width = view.crop
        image = image.crop((left, top, left + width, top + height))
    image = image.resize(size[::-1], Image.Resampling[(view.interpolation or "bilinear").upper()])
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else image)


LARGE = [View((3, 5, 40, 50), size=64), View((0, 10, 64, 64), flip=True, size=(64, 64), interpolation="bicubic")]
SMALL = [View((9, 9, 20, 30), True, 32), View((0, 0, 10, 10), size=32), View(size=32)]


@pytest.mark.parametrize("kind", ["file", "path", "PIL", "array"])
def test_views_of_every_kind_of_picture(client: Client, server: FakeServer, tmp_path: Path, kind: str) -> None:
    pictures = [photo(seed=seed) for seed in range(2)]
    (tmp_path / "0.png").write_bytes(png(pictures[0]))
    given: dict[str, Callable[[Array], Any]] = {
        "file": png,
        "path": lambda pixels: tmp_path / "0.png" if pixels is pictures[0] else png(pixels),
        "PIL": Image.fromarray,
        "array": lambda pixels: pixels,
    }
    features = client.extract([ImageViews(given[kind](pixels), LARGE) for pixels in pictures], KINDS, dtype="float32")
    assert (features.images.tolist(), features.views.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert features.input_size == (64, 64)
    for row, features_of_row in enumerate(features):
        pixels = seen(pictures[row // 2], LARGE[row % 2], (64, 64))
        assert (features_of_row.image, features_of_row.view) == (row // 2, row % 2)
        for name in KINDS:
            assert np.array_equal(getattr(features, name)[row], expected(pixels, name))
            assert np.array_equal(getattr(features_of_row, name), expected(pixels, name))
    [request] = server.requests
    assert not request.HasField("pixels")
    assert [len(image.views) for image in request.images] == [2, 2]


def test_two_large_and_three_small_views(client: Client) -> None:
    pictures = [photo(seed=seed) for seed in range(3)]
    views = [*LARGE, *SMALL]
    features = client.extract([ImageViews(png(pixels), views) for pixels in pictures], KINDS, dtype="float32", layers=7)
    assert len(features) == 15
    assert features.input_sizes == ((64, 64), (32, 32))
    assert np.array_equal(features.images, np.repeat([0, 1, 2], 5))
    assert np.array_equal(features.views, np.tile(range(5), 3))
    for size, numbers in ((64, [0, 1]), ((32, 32), [2, 3, 4])):
        part = features.at_size(size)
        assert (part.images.tolist(), part.views.tolist()) == (sorted([0, 1, 2] * len(numbers)), numbers * 3)
        side = 64 if size == 64 else 32
        assert (part.input_size, part.grid, part.layers[7].grid) == ((side, side), (side // 16,) * 2, (side // 16,) * 2)
        for row, (image, view) in enumerate(zip(part.images, part.views, strict=True)):
            pixels = seen(pictures[image], views[view], (side, side))
            assert np.array_equal(part.patches[row], expected(pixels, "patches"))
            assert np.array_equal(part[row].layers[7].cls, expected(pixels, "cls", layer=7))
            assert (part[row].image, part[row].view) == (image, view)
        assert not part.patches.flags.writeable  # what came in, and no copy of it
        assert np.shares_memory(part.patches, features[numbers[0]].patches)
    assert features.cls.shape == (15, 24)
    assert np.array_equal(features.cls[3], expected(seen(pictures[0], views[3], (32, 32)), "cls"))
    with pytest.raises(MixedSizes, match=r"2 input sizes \(64x64, 32x32\).*no one patches.*features\.at_size"):
        assert features.patches is None
    with pytest.raises(ValueError, match=r"no features have the input size 96x96; there are 64x64, 32x32"):
        features.at_size(96)
    with pytest.raises(ValueError, match=r"size is 0"):
        features.at_size(0)
    assert repr(features).startswith(
        "<Features of 15 rows (6 of 64x64, 9 of 32x32): cls [15, 24], patches of 2 sizes, registers [15, 4, 24], "
    )


def test_views_beside_whole_images(client: Client) -> None:
    picture = photo(64, 64)
    features = client.extract(
        [picture, ImageViews(picture, [View(flip=True)]), png(picture)], "cls", preset="none", dtype="float32"
    )
    assert (features.images.tolist(), features.views.tolist()) == ([0, 1, 2], [0, 0, 0])
    assert np.array_equal(features.cls[1], expected(picture[:, ::-1], "cls"))
    assert np.array_equal(features.cls[2], expected(picture, "cls"))


def test_views_of_an_upright_picture(client: Client, server: FakeServer) -> None:
    image = Image.fromarray(photo())
    image.getexif()[0x0112] = 6
    upright = np.rot90(photo(), -1)
    features = client.extract(ImageViews(image, [View((0, 0, 96, 32), size=32)]), "cls", exif=True, dtype="float32")
    assert np.array_equal(features.cls[0], expected(seen(upright, View((0, 0, 96, 32)), (32, 32)), "cls"))


def test_an_error_of_one_view_fails_its_image(client: Client) -> None:
    images = [ImageViews(png(photo(seed=seed)), [View(size=64), View((0, 0, 99, 16), size=32)]) for seed in range(2)]
    images.insert(0, ImageViews(png(photo(seed=7)), LARGE[:1] + SMALL[:1]))
    features = client.extract(images, dtype="float32", on_error="return")
    assert set(features.errors) == {1, 2}
    assert isinstance(features.errors[1], InvalidRequest)
    assert features.errors[2].violations[0].field == "images[2].views[1].crop"
    assert len(features) == 6
    assert [row.error is None for row in features] == [True, True, False, False, False, False]
    large = features.at_size(64)
    assert large.images.tolist() == [0, 1, 2]
    assert large.patches[0].any()
    assert not large.patches[1:].any()


def test_a_view_of_a_size_that_the_model_does_not_take_has_no_row(client: Client) -> None:
    good = ImageViews(png(photo()), [View(size=64), View(size=32)])
    bad = ImageViews(png(photo(seed=1)), [View(size=64), View(size=33)])
    features = client.extract([good, bad], KINDS, dtype="float32", on_error="return")
    assert (len(features), set(features.errors)) == (4, {1})
    assert [len(features.at_size(size)) for size in (64, 32)] == [2, 1]
    assert features[3].input_size == (0, 0)
    assert features[3].patches.shape == (0, 24)
    assert not features.cls[2:].any()
    only = client.extract([ImageViews(png(photo()), [View(size=64)]), bad], dtype="float32", on_error="return")
    assert (len(only), len(only.at_size(64))) == (3, 2)
    assert only.patches.shape == (3, 16, 24)  # in the place of a size that nobody knows, that of the others


WRONG_VIEWS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "crop of three": (lambda: View((0, 0, 5)), ValueError, r"crop is \(0, 0, 5\).*\(top, left, height, width\)"),  # type: ignore[arg-type]
    "negative crop": (lambda: View((-1, 0, 5, 5)), ValueError, r"crop is \(-1, 0, 5, 5\)"),
    "empty crop": (lambda: View((0, 0, 5, 0)), ValueError, "height and width of at least 1"),
    "float crop": (lambda: View((0, 0, 5.0, 5)), ValueError, r"crop is \(0, 0, 5\.0, 5\)"),  # type: ignore[arg-type]
    "crop that is a number": (lambda: View(5), ValueError, "crop is 5"),  # type: ignore[arg-type]
    "flip": (lambda: View(flip="left"), TypeError, "flip is 'left'; allowed are True and False"),  # type: ignore[arg-type]
    "size": (lambda: View(size=0), ValueError, "size is 0"),
    "interpolation": (lambda: View(interpolation="box"), ValueError, "interpolation has 'box'"),  # type: ignore[arg-type]
    "no views": (lambda: ImageViews(b"", []), ValueError, "views is empty; give at least one"),
    "no view": (lambda: ImageViews(b"", [(0, 0, 5, 5)]), TypeError, "it must be a sequence of View"),  # type: ignore[list-item]
    "one view": (lambda: ImageViews(b"", View()), TypeError, "it must be a sequence of View"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG_VIEWS)
def test_wrong_views_are_named_where_they_are_made(case: str) -> None:
    make, kind, message = WRONG_VIEWS[case]
    with pytest.raises(kind, match=message):
        make()


def test_wrong_pictures_of_views_are_named_before_anything_is_sent(client: Client, server: FakeServer) -> None:
    floats = ImageViews(np.zeros((3, 32, 32), np.float32), [View()])
    cases: list[tuple[Any, type[Exception], str]] = [
        (floats, ValueError, r"images\[1\] has views of a float32 array: normalized pixels"),
        (ImageViews(floats, [View()]), TypeError, r"images\[1\] is ImageViews of ImageViews"),  # type: ignore[arg-type]
        (ImageViews(7, [View()]), TypeError, r"images\[1\] is a int; allowed are encoded bytes"),  # type: ignore[arg-type]
        (ImageViews(np.zeros((2, 32, 32, 3), np.uint8), [View()]), ValueError, r"images\[1\] is an array of uint8"),
    ]
    for image, kind, message in cases:
        with pytest.raises(kind, match=message):
            client.extract([photo(), image])
    assert not server.requests


def test_layers_with_outputs_of_their_own(client: Client) -> None:
    pixels = photo()
    layers = (2, Layer(-1, "registers", norm=False), Layer(5, ("cls", "patches"), norm=False))
    features = client.extract(pixels, "cls", preset="none", dtype="float32", layers=layers)
    assert list(features.layers) == [2, -1, 5]
    found = {
        layer: [kind for kind in KINDS if getattr(features.layers[layer], kind) is not None] for layer in (2, -1, 5)
    }
    assert found == {2: ["cls"], -1: ["registers"], 5: ["cls", "patches"]}
    assert np.array_equal(features.layers[-1].registers[0], expected(pixels, "registers", layer=11, norm=False))
    assert np.array_equal(features[0].layers[5].patches, expected(pixels, "patches", layer=5, norm=False))
    assert np.array_equal(features.layers[2].cls[0], expected(pixels, "cls", layer=2))


def test_layers_alone(client: Client) -> None:
    pixels = photo()
    features = client.extract(pixels, (), preset="none", dtype="float32", layers=Layer(3, "patches"))
    assert features.cls is features.patches is features.registers is None
    assert np.array_equal(features.layers[3].patches[0], expected(pixels, "patches", layer=3))
    assert (features.grid, features.layers[3].grid) == ((4, 6), (4, 6))


@pytest.mark.parametrize("pooling", [(2, 3), (7, 7), Pooling((2, 3), "bilinear")])
def test_pooled_patches_have_one_grid_whatever_the_size(client: Client, pooling: Any) -> None:
    pictures = [photo(64, 96), photo(32, 64, 1), photo(64, 96, 2)]
    features = client.extract(pictures, preset="none", dtype="float32", pooling=pooling, layers=4)
    grid = pooling.grid if isinstance(pooling, Pooling) else pooling
    assert features.grid == features[1].grid == features.layers[4].grid == grid
    for layer, holder in ((None, features), (4, features.layers[4])):
        found = [expected(pixels, "patches", layer=layer, pooling=pooling) for pixels in pictures]
        assert np.array_equal(holder.patches, found)
    with pytest.raises(MixedSizes, match="no one input_size"):
        assert features.input_size


def test_projected_patches(client: Client) -> None:
    pixels = photo()
    [projection] = client.model().projections
    assert (projection.name, projection.input_channels, projection.output_channels) == ("narrow", 24, 5)
    features = client.extract([pixels, photo(seed=1)], preset="none", dtype="float32", projection="narrow", layers=4)
    assert features.patches.shape == (2, 24, 5)
    assert features.cls.shape == (2, 24)
    assert np.array_equal(features.patches[0], expected(pixels, "patches", projection=WEIGHT))
    assert np.array_equal(features.layers[4].patches[0], expected(pixels, "patches", layer=4, projection=WEIGHT))
    assert features.fingerprint == f"f00d+{projection.fingerprint}"
    with pytest.raises(InvalidRequest, match="there is no projection 'wide'"):
        client.extract(pixels, projection="wide")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_channels_first(client: Client, dtype: Any) -> None:
    pictures = [photo(), photo(seed=1)]
    maps = client.extract(pictures, KINDS, preset="none", dtype=dtype, channels_first=True, layers=4)
    rows = client.extract(pictures, KINDS, preset="none", dtype=dtype, layers=4)
    assert maps.patches.shape == maps.layers[4].patches.shape == (2, 24, 4, 6)
    assert np.array_equal(maps.patches, rows.patches.transpose(0, 2, 1).reshape(2, 24, 4, 6))
    assert np.array_equal(maps.layers[4].patches.reshape(2, 24, 24), rows.layers[4].patches.transpose(0, 2, 1))
    assert np.array_equal(maps.cls, rows.cls)
    assert maps[1].patches.shape == (24, 4, 6)
    assert np.array_equal(maps[1].patches, maps.patches[1])
    failed = client.extract([b"x"], preset="none", dtype=dtype, channels_first=True, on_error="return")
    assert failed.patches.shape == (1, 0, 0, 0)


def test_int8_is_read_as_float32(client: Client) -> None:
    pictures = [photo(), photo(seed=1)]
    features = client.extract(pictures, KINDS, preset="none", dtype="int8", layers=4)
    exact = client.extract(pictures, KINDS, preset="none", dtype="float32", layers=4)
    for holder, other, layer in ((features, exact, None), (features.layers[4], exact.layers[4], 4)):
        for kind in KINDS:
            found, true = getattr(holder, kind), getattr(other, kind)
            assert found.dtype == np.float32
            assert np.all(np.abs(found - true) <= np.abs(true).max(-1, keepdims=True) / 127 / 2 * 1.001)
            values, scales = features.quantized(kind, layer)
            assert (values.dtype, scales.dtype) == (np.int8, np.float32)
            assert (values.shape, scales.shape) == (true.shape, true.shape[:-1])
            assert np.array_equal(values * scales[..., None], found)
            assert not values.flags.writeable  # what came in
            assert np.array_equal(getattr(features[1] if layer is None else features[1].layers[4], kind), found[1])
    assert "float32, 0 failed" in repr(features)
    with pytest.raises(ValueError, match="these features are not int8"):
        exact.quantized("cls")
    assert client.extract(pictures, "cls", dtype="int8").quantized("patches") is None


def test_int8_maps_keep_a_scale_a_token(client: Client) -> None:
    features = client.extract([photo()], "patches", preset="none", dtype="int8", channels_first=True)
    values, scales = features.quantized("patches")
    assert (values.shape, scales.shape) == ((1, 24, 4, 6), (1, 24))
    assert np.array_equal(values * scales.reshape(1, 1, 4, 6), features.patches)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_views_of_a_split_call(dtype: Any, channels_first: bool) -> None:
    images = [ImageViews(png(photo(seed=seed)), [LARGE[0], SMALL[0], SMALL[1]]) for seed in range(5)]
    images[3] = ImageViews(b"broken", [LARGE[0], SMALL[0], SMALL[1]])
    asked: Any = {"dtype": dtype, "channels_first": channels_first, "on_error": "return", "layers": 2}
    with FakeServer() as server, Client(server.target, deadline=LIMIT) as client:
        whole = client.extract(images, KINDS, **asked)
        assert len(server.requests) == 1
        server.model = replace(MODEL, limits=replace(MODEL.limits, max_images_per_request=6))
        with Client(server.target, deadline=LIMIT) as other:
            parts = other.extract(images, KINDS, **asked)
        assert len(server.requests) == 4
    assert np.array_equal(whole.images, parts.images)
    assert np.array_equal(whole.views, parts.views)
    assert set(whole.errors) == set(parts.errors) == {3}
    for size in (64, 32):
        one, other_one = whole.at_size(size), parts.at_size(size)
        assert np.array_equal(one.images, other_one.images)
        for kind in KINDS:
            assert np.array_equal(getattr(one, kind), getattr(other_one, kind))
            assert np.array_equal(getattr(one.layers[2], kind), getattr(other_one.layers[2], kind))
            if dtype == "int8":
                for mine, theirs in zip(one.quantized(kind, 2), other_one.quantized(kind, 2), strict=True):
                    assert np.array_equal(mine, theirs)
    assert np.array_equal(whole.cls, parts.cls)
    assert whole.cls[0].any()


def test_bytes_that_came_are_counted(client: Client) -> None:
    features = client.extract([photo()] * 3, preset="none", dtype="float32")
    assert 0 < features.nbytes - features.cls.nbytes - features.patches.nbytes < 300


def test_features_of_one_row_at_a_time(client: Client) -> None:
    features: Features = client.extract([photo(), photo(seed=1)], preset="none", dtype="float32")
    assert [np.array_equal(row.patches, features.patches[index]) for index, row in enumerate(features)] == [True, True]
    assert features[-1].image == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_arrays_are_aligned_to_their_items(client: Client, dtype: Any) -> None:
    """As Arrow and Lance need them. The fake server begins tensors at any byte, as others may."""
    for count in (1, 2, 3):
        features = client.extract(
            [np.zeros((32, 32, 3), np.uint8)] * count,
            ("cls", "patches", "registers"),
            layers=[3],
            preset="none",
            dtype=dtype,
        )
        for holder in (features, features.layers[3], features[0], features[0].layers[3]):
            for array in (holder.cls, holder.patches, holder.registers):
                assert array is not None
                assert array.flags.aligned
        for kind in ("cls", "patches"):
            for array in (features.quantized(kind) or ()) if dtype == "int8" else ():
                assert array.flags.aligned
