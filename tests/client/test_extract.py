"""Images in, named arrays out, over a real connection."""

from __future__ import annotations

import gc
import io
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from dinov3_client import Client, ImageErrors, InvalidRequest, InvalidResponse, MixedSizes
from dinov3_client.testing import MODEL, FakeServer, expected
from dinov3_serving.features import TokenKind
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.client.conftest import SERVED


def photo(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def normalized(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ((pixels / 255 - MODEL.mean) / MODEL.std).transpose(2, 0, 1).astype(np.float32)


def same(features: Any, pixels: np.ndarray[Any, Any], layer: int | None = None) -> None:
    """These are the features of these very pixels (float32, exactly)."""
    for kind in get_args(TokenKind):
        found = getattr(features, kind)
        assert found is None or np.array_equal(found, expected(pixels, kind, layer=layer, model=SERVED)), kind


def test_every_kind_of_image_in_one_call(client: Client, server: FakeServer, tmp_path: Path) -> None:
    pictures = [photo(seed=seed) for seed in range(8)]
    for index in (2, 3):
        (tmp_path / f"{index}.png").write_bytes(png(pictures[index]))
    floats = normalized(pictures[7])
    features = client.extract(
        [
            png(pictures[0]),
            bytearray(png(pictures[1])),
            tmp_path / "2.png",
            str(tmp_path / "3.png"),
            memoryview(png(pictures[4])),
            Image.fromarray(pictures[5]),
            pictures[6],
            floats,
        ],
        ("cls", "patches", "registers"),
        preset="none",
        dtype="float32",
    )
    assert len(features) == 8
    for one, pixels in zip(features, [*pictures[:7], floats], strict=True):
        same(one, pixels)
        assert one.error is None
    [request] = server.requests
    kinds = [image.WhichOneof("source") for image in request.images]
    assert kinds == ["encoded"] * 5 + ["pixels"] * 3
    assert request.images[2].encoded == (tmp_path / "2.png").read_bytes()  # sent as it is, not decoded here
    assert features.cls.shape == (8, MODEL.embed_dim)
    assert features.patches.shape == (8, 24, MODEL.embed_dim)
    assert features.registers.shape == (8, 4, MODEL.embed_dim)
    assert (features.grid, features.input_size) == ((4, 6), (64, 96))


@pytest.mark.parametrize("give", ["array", "list", "single", "transposed", "strided", "fortran"])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_pixels_of_one_size_travel_packed(client: Client, server: FakeServer, give: str, kind: type) -> None:
    pictures = [photo(seed=seed) if kind is np.uint8 else normalized(photo(seed=seed)) for seed in range(3)]
    given: Any = {
        "array": np.stack(pictures),
        "list": pictures,
        "single": pictures[0],
        "transposed": [np.asfortranarray(pixels) for pixels in pictures],
        "strided": np.stack(pictures)[:, ::-1, ::-1][:, ::-1, ::-1],
        "fortran": np.asfortranarray(np.stack(pictures)),
    }[give]
    features = client.extract(given, preset="none", dtype="float32")
    [request] = server.requests
    assert request.HasField("pixels")
    assert not request.images
    assert tuple(request.pixels.shape) == np.stack(pictures)[: len(features)].shape
    assert len(features) == (1 if give == "single" else 3)
    for one, pixels in zip(features, pictures, strict=False):
        same(one, pixels)


def test_arrays_of_several_sizes_or_dtypes_travel_apart(client: Client, server: FakeServer) -> None:
    pictures = [photo(64, 64), photo(32, 64), normalized(photo(64, 64))]
    features = client.extract(pictures, preset="none", dtype="float32")
    assert [tuple(image.pixels.shape) for image in server.requests[0].images] == [(64, 64, 3), (32, 64, 3), (3, 64, 64)]
    for one, pixels in zip(features, pictures, strict=True):
        same(one, pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pil_images_of_every_8_bit_mode(client: Client, server: FakeServer, mode: str) -> None:
    image = Image.fromarray(photo()).convert(mode)
    client.extract(image, preset="none")
    sent = server.requests[0].pixels
    assert sent.data == image.convert("RGB").tobytes()
    assert tuple(sent.shape) == (1, 64, 96, 3)


def test_pil_palette_with_transparency_is_sent_without_a_warning(client: Client, server: FakeServer) -> None:
    image = Image.fromarray(photo()).convert("P")
    image.info["transparency"] = bytes(range(256))
    client.extract(image, preset="none")
    assert len(server.requests[0].pixels.data) == 64 * 96 * 3


def test_exif_turns_pil_images_here_and_files_there(client: Client, server: FakeServer) -> None:
    pixels = photo(64, 96)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6  # to be turned by 90 degrees, clockwise
    upright, turned = client.extract(image, preset="none"), client.extract(image, preset="none", exif=True)
    assert (upright.grid, turned.grid) == ((4, 6), (6, 4))
    assert server.requests[1].pixels.data == np.rot90(pixels, -1).tobytes()
    assert [request.preprocessing.apply_exif_orientation for request in server.requests] == [False, True]


WRONG_IMAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "none": ([], ValueError, "images is empty"),
    "empty array": (np.zeros((0, 32, 32, 3), np.uint8), ValueError, "images is empty"),
    "float64": (np.zeros((32, 32, 3)), ValueError, r"images\[0\] is an array of float64 \[32, 32, 3\]; allowed"),
    "uint8 CHW": (np.zeros((3, 32, 32), np.uint8), ValueError, r"uint8 \[3, 32, 32\]; allowed are uint8 \[H, W, 3\]"),
    "float32 HWC": ([np.zeros((32, 32, 3), np.float32)], ValueError, r"float32 \[32, 32, 3\].*float32 \[3, H, W\]"),
    "gray": (np.zeros((32, 32), np.uint8), ValueError, r"array of uint8 \[32, 32\]; allowed are"),
    "alpha": (np.zeros((2, 32, 32, 4), np.uint8), ValueError, r"images\[0\] is an array of uint8 \[32, 32, 4\]"),
    "no rows": (np.zeros((0, 32, 3), np.uint8), ValueError, r"uint8 \[0, 32, 3\]"),
    "batch in a list": ([np.zeros((2, 32, 32, 3), np.uint8)], ValueError, r"uint8 \[2, 32, 32, 3\]"),
    "big-endian": ([np.zeros((3, 32, 32), ">f4")], ValueError, "float32 of foreign byte order"),
    "16-bit PIL": ([Image.new("I;16", (32, 32))], ValueError, "PIL image of mode I;16"),
    "empty PIL": ([Image.new("RGB", (0, 0))], ValueError, r"images\[0\] is an array of uint8 \[0, 0, 3\]"),
    "float PIL": ([Image.new("F", (32, 32))], ValueError, "PIL image of mode F"),
    "number": (7, TypeError, "images is a int; allowed are encoded bytes, a path"),
    "number in a list": ([b"", 7], TypeError, r"images\[1\] is a int; allowed are encoded bytes"),
    "no such file": (["no/such/file.jpg"], FileNotFoundError, r"no/such/file\.jpg"),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_images_are_named_before_anything_is_sent(client: Client, server: FakeServer, case: str) -> None:
    images, kind, message = WRONG_IMAGES[case]
    with pytest.raises(kind, match=message):
        client.extract(images)
    assert not server.calls


def test_numpy_integers_are_numbers(client: Client) -> None:
    features = client.extract(photo(), size=np.int64(32), layers=np.arange(2))
    assert features.input_size == (32, 32)
    assert list(features.layers) == [0, 1]


def test_one_output_and_one_layer_need_no_sequence(client: Client) -> None:
    features = client.extract(photo(), "cls", layers=3)
    assert features.cls.shape == (1, MODEL.embed_dim)
    assert features.patches is None
    assert features.registers is None
    assert features.layers[3].patches is None
    assert features[0].patches is None


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", np.float32), ("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
)
def test_dtypes(client: Client, dtype: Any, kind: type) -> None:
    pixels = photo()
    features = client.extract(pixels, preset="none", dtype=dtype)
    assert features.patches is not None
    assert features.patches.dtype == np.dtype(kind)
    assert np.array_equal(features.patches[0], expected(pixels, "patches").astype(kind))


def test_layers_are_keyed_as_requested_and_negative_ones_pin_the_model(client: Client, server: FakeServer) -> None:
    pixels = photo()
    kinds = ("cls", "patches", "registers")
    for _ in range(2):
        features = client.extract(pixels, kinds, preset="none", dtype="float32", layers=(-1, 0, -9))
        assert list(features.layers) == [-1, 0, -9]
        for asked, block in ((-1, 11), (0, 0), (-9, 3)):
            same(features[0].layers[asked], pixels, block)
            packed = features.layers[asked].patches
            assert features.layers[asked].grid == features[0].layers[asked].grid == ((8, 12) if block == 0 else (4, 6))
            assert packed is not None
            assert np.array_equal(packed[0], features[0].layers[asked].patches)
        same(features[0], pixels)
    assert [request.fingerprint for request in server.requests] == ["f00d", "f00d"]
    assert len(server.calls) == 3  # the model was asked for once


def test_answer_has_timings_frontend_and_fingerprint(client: Client) -> None:
    features = client.extract(photo())
    timings = features.timings
    assert (timings.decode_seconds, timings.queue_seconds, timings.inference_seconds) == (0.25, 0.5, 0.75)
    assert (timings.batch_images, timings.batches) == (4, 2)
    assert (features.frontend, features.fingerprint) == (0, "f00d")
    assert (
        repr(features)
        == "<Features of 1 images (1 of 256x256): cls [1, 24], patches [1, 256, 24], layers [], float16, 0 failed>"
    )


def test_sequence_of_images(client: Client) -> None:
    features = client.extract([photo(seed=seed) for seed in range(4)], preset="none", dtype="float32")
    same(features[-1], photo(seed=3))
    for one, seed in zip(features[1:3], (1, 2), strict=True):
        same(one, photo(seed=seed))
    with pytest.raises(IndexError):
        features[4]


def test_mixed_sizes_pack_what_can_be_packed(client: Client) -> None:
    pictures = [photo(64, 64), photo(32, 48, 1), photo(64, 64, 2), photo(32, 48, 3)]
    kinds = ("cls", "patches", "registers")
    features = client.extract(pictures, kinds, preset="none", dtype="float32", layers=(4, 0))
    for one, pixels in zip(features, pictures, strict=True):
        same(one, pixels)
        same(one.layers[4], pixels, 4)
        same(one.layers[0], pixels, 0)
        assert one.input_size == pixels.shape[:2]
    assert np.array_equal(features.cls, [expected(pixels, "cls") for pixels in pictures])  # in the order of the images
    assert np.array_equal(features.registers, [expected(pixels, "registers") for pixels in pictures])
    assert (features[1].grid, features[1].layers[4].grid, features[1].layers[0].grid) == ((2, 3), (2, 3), (4, 6))
    reads: list[Callable[[], object]] = [
        lambda: features.patches,
        lambda: features.layers[4].patches,
        lambda: features.layers[0].grid,
        lambda: features.grid,
        lambda: features.input_size,
    ]
    for read in reads:
        with pytest.raises(MixedSizes, match=r"2 input sizes \(64x64, 32x48\).*use features\.at_size"):
            read()


def test_failed_images_raise_by_default(client: Client, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageErrors) as caught:
        client.extract([png(photo()), tmp_path / "broken.jpg", b"nor this"])
    assert set(caught.value.errors) == {1, 2}
    error = caught.value.errors[1]
    assert isinstance(error, InvalidRequest)
    assert error.violations[0].field == "images[1].encoded"
    first, second = (caught.value.errors[index].message for index in (1, 2))
    assert str(caught.value) == f"2 of 3 images failed: image 1 ({tmp_path}/broken.jpg): {first}; image 2: {second}"
    assert (" 10 bytes " in first, " 8 bytes " in second) == (True, True)


def test_many_failed_images_make_a_short_message(client: Client) -> None:
    with pytest.raises(ImageErrors, match=r"^20 of 20 images failed: image 0: .*; and 15 more, all in `errors`$") as e:
        client.extract([b"x"] * 20)
    assert len(e.value.errors) == 20


def test_failed_images_are_zeros_when_returned(client: Client) -> None:
    pictures = [photo(), photo(seed=2)]
    features = client.extract([pictures[0], b"broken", pictures[1]], size=(64, 96), dtype="float32", on_error="return")
    assert set(features.errors) == {1}
    assert isinstance(features[1].error, InvalidRequest)
    assert features.patches.shape == (3, 24, MODEL.embed_dim)
    assert not features.patches[1].any()
    for index, pixels in ((0, pictures[0]), (2, pictures[1])):
        same(features[index], pixels)


def test_failed_image_of_unknown_size_takes_the_size_of_the_others(client: Client) -> None:
    pictures = [photo(), photo(seed=2)]
    features = client.extract(
        [pictures[0], b"broken", pictures[1]], preset="none", dtype="float32", on_error="return", layers=(1, 0)
    )
    assert features.patches.shape == (3, 24, MODEL.embed_dim)
    assert features.cls.shape == (3, MODEL.embed_dim)
    assert not features.patches[1].any()
    assert not features.cls[1].any()
    assert np.array_equal(features.patches[2], expected(pictures[1], "patches"))
    one = features[1]
    assert one.error is features.errors[1]
    assert one.grid == (4, 6)
    assert one.patches.shape == (24, MODEL.embed_dim)
    assert not one.patches.any()
    assert one.layers[1].cls.shape == (MODEL.embed_dim,)
    assert (one.layers[0].grid, one.layers[0].patches.shape) == ((8, 12), (96, SERVED.layer_dims[0]))


def test_failed_image_of_unknown_size_among_several_sizes(client: Client) -> None:
    features = client.extract([photo(64, 64), b"broken", photo(32, 48)], preset="none", on_error="return")
    one = features[1]
    assert (one.grid, one.input_size) == ((0, 0), (0, 0))
    assert one.patches.shape == (0, MODEL.embed_dim)
    assert one.cls.shape == (MODEL.embed_dim,)
    assert features.cls.shape == (3, MODEL.embed_dim)
    assert not features.cls[1].any()


def test_all_images_failed(client: Client) -> None:
    features = client.extract([b"a", b"b"], ("cls", "patches"), preset="none", on_error="return")
    assert set(features.errors) == {0, 1}
    assert features.cls.shape == (2, 0)
    assert features.patches.shape == (2, 0, 0)
    assert (features.grid, features.input_size) == ((0, 0), (0, 0))
    assert features[0].cls.shape == (0,)


def test_arrays_are_read_only_views_made_once(client: Client) -> None:
    features = client.extract([photo(), photo(seed=1)], preset="none")
    patches = features.patches
    assert features.patches is patches
    assert not patches.flags.writeable
    assert np.shares_memory(features[0].patches, patches)


def test_features_go_without_the_cycle_collector(client: Client) -> None:
    features = client.extract([photo(64, 64), photo(32, 48)], preset="none", layers=(1,))
    assert all(part is not None for part in (features.cls, features.layers[1].cls, features[0].patches))
    packing = weakref.ref(features._packing)
    gc.disable()
    try:
        del features
        assert packing() is None
    finally:
        gc.enable()


def _shorten(tensor: pb.Tensor) -> None:
    tensor.data = tensor.data[:-2]


BROKEN_ANSWERS: dict[str, tuple[Callable[[pb.ExtractResponse], object], str]] = {
    "short data": (lambda r: _shorten(r.blocks[0].cls), r"cls of shape \[3, 24\] and float16 has 142 bytes"),
    "other dtype": (lambda r: setattr(r.blocks[0].cls, "dtype", pb.DATA_TYPE_BFLOAT16), "asked for float16, cls came"),
    "unknown dtype": (lambda r: setattr(r.blocks[0].cls, "dtype", 77), r"came as unknown \(77\)"),
    "negative shape": (lambda r: r.blocks[0].cls.shape.__setitem__(slice(None), [-3, -24]), r"shape \[-3, -24\]"),
    "rank": (lambda r: r.blocks[0].cls.shape.__setitem__(slice(None), [72]), r"cls has shape \[72\] for 3 rows"),
    "grid": (lambda r: setattr(r.blocks[0], "grid_width", 5), r"patches has shape \[3, 256, 24\] for 3 rows and a"),
    "layer's grid": (
        lambda r: setattr(r.blocks[0].layers[0], "grid_width", 5),
        r"layer 2's patches has shape \[3, 256, 24\] for 3 rows and a grid of \(16, 5\)",
    ),
    "no cls": (lambda r: r.blocks[0].ClearField("cls"), "asked for cls, the answer has none"),
    "no layer's cls": (lambda r: r.blocks[0].layers[0].ClearField("cls"), "asked for layer 2's cls, the answer has"),
    "other layer": (lambda r: setattr(r.blocks[0].layers[0], "layer", 5), r"the layers \[2\], the answer has \[5\]"),
    "no layers": (lambda r: r.blocks[0].ClearField("layers"), r"the layers \[2\], the answer has \[\]"),
    "no blocks": (lambda r: r.ClearField("blocks"), r"neither features nor an error for the images \[0, 1, 2\]"),
    "row twice": (lambda r: r.blocks[0].image_indices.__setitem__(1, 0), r"not in order.*rows \[0, 0, 2\]"),
    "order": (
        lambda r: r.blocks[0].image_indices.__setitem__(slice(None), [1, 0, 2]),
        r"not in order.*rows \[1, 0, 2\]",
    ),
    "no such image": (lambda r: r.blocks[0].image_indices.__setitem__(2, 3), "the answer to 3 images has the rows"),
    "no such error": (lambda r: r.errors.add(image_index=9), r"errors for \[9\]"),
}


@pytest.mark.parametrize("case", BROKEN_ANSWERS)
def test_answers_are_checked(client: Client, server: FakeServer, case: str) -> None:
    server.edit, message = BROKEN_ANSWERS[case]
    with pytest.raises(InvalidResponse, match=message):
        client.extract([photo(seed=seed) for seed in range(3)], layers=(2,), on_error="return")


def test_channels_differing_between_sizes_are_noticed(client: Client, server: FakeServer) -> None:
    def halve(response: pb.ExtractResponse) -> None:
        cls = response.blocks[1].cls
        cls.CopyFrom(pb.Tensor(dtype=cls.dtype, shape=[1, 12], data=cls.data[:24]))

    server.edit = halve
    with pytest.raises(InvalidResponse, match=r"cls has shapes \[1, 24\] and \[1, 12\] in one answer"):
        client.extract([photo(64, 64), photo(32, 48)], preset="none")


def test_images_may_come_from_a_generator(client: Client) -> None:
    features = client.extract(photo(seed=seed) for seed in itertools.chain(range(2), range(1)))
    assert len(features) == 3
