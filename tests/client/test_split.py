"""A call that is over a limit of the server becomes several requests, and reads as one."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinov3_client import (
    Client,
    FieldViolation,
    ImageErrors,
    ImageViews,
    InvalidRequest,
    InvalidResponse,
    Layer,
    Model,
    ModelMismatch,
    Pooling,
    Preset,
    View,
)
from dinov3_client._features import join
from dinov3_client._images import LoadedImage, load
from dinov3_client._model import read_model
from dinov3_client._request import check_options
from dinov3_client._response import read
from dinov3_client._split import split
from dinov3_client.testing import MODEL, Failure, FakeServer, expected
from dinov3_client.testing._answer import answer
from dinov3_client.testing._model import message_of
from dinov3_client.testing._projection import read_projection
from dinov3_serving.images import Decoding
from dinov3_serving.presets import PRESETS
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.support.waiting import LIMIT


def limited(**limits: int) -> Model:
    return replace(MODEL, limits=replace(MODEL.limits, **limits))


def photo(height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def images_of(query: Any) -> int:
    message = query.message
    return len(message.images) or message.pixels.shape[0]


@pytest.mark.parametrize(
    ("count", "most", "parts"),
    [(4, 4, [4]), (5, 4, [3, 2]), (65, 64, [33, 32]), (9, 4, [3, 3, 3]), (10, 3, [3, 3, 3, 1]), (3, 1, [1, 1, 1])],
)
def test_parts_are_few_and_equal(count: int, most: int, parts: list[int]) -> None:
    found = split([LoadedImage(photo())] * count, check_options(), limited(max_images_per_request=most))
    assert [images_of(query) for query in found] == parts
    assert [query.first for query in found] == [sum(parts[:index]) for index in range(len(parts))]


def test_each_view_counts_and_views_of_an_image_stay_together() -> None:
    sources = [LoadedImage(photo(), views=(pb.View(),) * views) for views in (3, 3, 0, 2)]
    found = split(sources, check_options(), limited(max_images_per_request=5))
    assert [query.views for query in found] == [(3,), (3,), (0, 2)]


def test_an_image_over_a_limit_goes_alone() -> None:
    sources = [
        LoadedImage(photo()),
        LoadedImage(photo(), views=(pb.View(),) * 9),
        LoadedImage(photo()),
        LoadedImage(photo()),
    ]
    found = split(sources, check_options(), limited(max_images_per_request=4))
    assert [query.views for query in found] == [(0,), (9,), (0, 0)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(1, 12),
    st.sampled_from([20_000, 60_000, 300_000]),
)
def test_parts_are_within_the_limits(given: list[tuple[int, int]], most: int, nbytes: int) -> None:
    sources = [LoadedImage(bytes(size), views=(pb.View(),) * views) for size, views in given]
    model = limited(max_images_per_request=most, max_message_bytes=nbytes)
    found = split(sources, check_options("cls", size=64), model)
    assert [views for query in found for views in query.views] == [views for _, views in given]
    assert [image.encoded for query in found for image in query.message.images] == [source.data for source in sources]
    for query in found:
        if len(query.views) > 1:
            assert sum(max(1, views) for views in query.views) <= most
            assert len(query.data) <= nbytes


@pytest.mark.parametrize(("side", "parts"), [(64, 1), (640, 2)])
def test_the_sizes_of_presets_are_the_servers(side: int, parts: int) -> None:
    model = replace(limited(max_message_bytes=200_000), presets=(Preset("hf", (side, side), "bilinear"),))
    assert len(split([LoadedImage(png(photo()))] * 3, check_options(preset="hf"), model)) == parts


def test_presets_that_the_server_does_not_list_are_those_of_the_contract() -> None:
    response = message_of(MODEL, 0)
    response.ClearField("presets")
    response.presets.add(preset=pb.PRESET_HF, size=pb.Size(height=448, width=336), interpolation=99)
    response.presets.add(preset=99)
    default, _, none = PRESETS
    assert read_model(response.SerializeToString()).presets == (default, Preset("hf", (448, 336), "bilinear"), none)


# Whatever is asked for, the arithmetic is an upper bound, and near the truth.
WIDE = replace(
    MODEL,
    layer_dims=(384, 384, *(768,) * 10),
    layer_strides=(8, 8, *(16,) * 10),
    limits=replace(MODEL.limits, max_images_per_request=1000),
)
NARROW = read_projection(np.ones((300, 768)))
FLAT = {size: png(np.zeros((*size, 3), np.uint8)) for size in ((32, 48), (64, 64), (64, 128), (96, 64))}
FLOATS = np.zeros((3, 32, 48), np.float32)
CROP = View((0, 0, 32, 16))
ANSWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "preset": (FLAT[32, 48], {}),
    "hf": (FLAT[32, 48], {"preset": "hf", "dtype": "float32"}),
    "size": (FLAT[32, 48], {"size": (64, 128), "dtype": "bfloat16"}),
    "a file as it is": (FLAT[96, 64], {"preset": "none"}),
    "pixels as they are": (photo(64, 128), {"preset": "none"}),
    "floats are never resized": (FLOATS, {"preset": "hf", "dtype": "float32", "layers": (2, 3)}),
    "registers": (FLAT[32, 48], {"outputs": ("registers", "cls")}),
    "int8": (FLAT[32, 48], {"dtype": "int8", "outputs": ("cls", "patches", "registers")}),
    "int8 channels first": (FLAT[32, 48], {"dtype": "int8", "channels_first": True}),
    "pooling": (FLAT[32, 48], {"pooling": Pooling((3, 5))}),
    "projection": (FLAT[32, 48], {"projection": "narrow"}),
    "layers": (FLAT[32, 48], {"layers": (0, Layer(5, ("registers", "patches"), norm=False))}),
    "layers alone": (FLAT[32, 48], {"outputs": (), "layers": Layer(1, "patches"), "dtype": "float32"}),
    "all of it": (FLAT[32, 48], {"layers": (2, 3), "projection": "narrow", "pooling": (9, 9), "dtype": "int8"}),
    "views": (ImageViews(FLAT[32, 48], [View(), View(size=32), View(size=(64, 32)), CROP]), {}),
    "views as they are": (ImageViews(FLAT[64, 64], [View(), CROP, View(size=96)]), {"preset": "none"}),
    "many small views": (ImageViews(FLAT[32, 48], [View(size=16)] * 60), {"outputs": "cls"}),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_size_of_an_answer_is_known_before(case: str) -> None:
    """An answer that is just over the limit is split; one under it by what frames and errors may take is not."""
    image, asked = ANSWERS[case]
    wanted = check_options(**{"outputs": ("cls", "patches"), **asked})
    model = replace(WIDE, projections=(NARROW.described("narrow"),))
    sources = list(load([image] * 4, Decoding()))

    def parts(nbytes: int) -> int:
        return len(split(sources, wanted, replace(model, limits=replace(model.limits, max_message_bytes=nbytes))))

    [query] = split(sources, wanted, model)
    truth = len(answer(query.message, model, {"narrow": NARROW}, {}).SerializeToString())
    assert truth > len(query.data), "the request would be split for its own size"
    rows = sum(max(1, views) for views in query.views)
    tensors = len(wanted.kinds) + sum(len(layer.kinds) for layer in wanted.layers)
    assert parts(truth - 1) > 1
    assert parts(truth + 1024 + 4 * 1024 + rows * (160 + 80 * tensors)) == 1


def test_pictures_are_measured_by_their_headers_only_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [LoadedImage(b"no picture"), LoadedImage(png(photo()))]
    opened = []
    whole = Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **named: (opened.append(1), whole(*given, **named))[1])
    for wanted in (check_options(), check_options(preset="none", size=32)):
        split(sources, wanted, MODEL)
    assert not opened
    assert len(split(sources, check_options(preset="none"), MODEL)) == 1
    assert len(opened) == 2


def test_parts_are_pinned_to_the_model() -> None:
    sources = [LoadedImage(photo())] * 3
    model = replace(limited(max_images_per_request=2), projections=(NARROW.described("narrow"),))

    def pins(count: int, fingerprint: str = "", **given: Any) -> set[str]:
        found = split(sources[:count], check_options(**given), model, fingerprint)
        return {query.message.fingerprint for query in found}

    assert pins(2) == {""}
    assert pins(3) == {"f00d"}
    assert pins(3, projection="narrow") == {f"f00d+{NARROW.fingerprint}"}
    assert pins(3, projection="unknown") == {"f00d"}
    assert pins(2, layers=-1) == {"f00d"}
    assert pins(2, layers=1) == {""}
    assert pins(1, "cafe") == pins(3, "cafe", layers=-1) == {"cafe"}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(limited(max_images_per_request=4)) as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, deadline=LIMIT) as client:
        yield client


def test_a_split_call_reads_as_one(client: Client, server: FakeServer) -> None:
    pictures = [photo(seed=seed) for seed in range(10)]
    features = client.extract(
        pictures, ("cls", "patches", "registers"), preset="none", dtype="float32", layers=(3, -1), deadline=20
    )
    assert sorted(request.pixels.shape[0] for request in server.requests) == [2, 4, 4]
    assert len(features) == 10
    assert features.images.tolist() == list(range(10))
    assert not features.views.any()
    for kind in ("cls", "patches", "registers"):
        for layer, holder in ((None, features), (3, features.layers[3]), (11, features.layers[-1])):
            found = [expected(pixels, kind, layer=layer) for pixels in pictures]
            assert np.array_equal(getattr(holder, kind), found)
    assert np.array_equal(features[7].patches, expected(pictures[7], "patches"))
    assert (features.grid, features.input_size, features.input_sizes) == ((2, 3), (32, 48), ((32, 48),))
    timings = features.timings
    assert (timings.decode_seconds, timings.queue_seconds, timings.inference_seconds) == (0.75, 0.5, 2.25)
    assert (timings.batch_images, timings.batches) == (4, 6)


def test_images_and_fields_are_counted_over_the_whole_call(client: Client, server: FakeServer) -> None:
    images: list[Any] = [png(photo(seed=seed)) for seed in range(6)]
    images[4] = b"broken"
    images[5] = ImageViews(images[5], [View(), View((0, 0, 99, 99))])
    with pytest.raises(ImageErrors, match=r"^2 of 6 images failed: image 4: .*; image 5: ") as caught:
        client.extract(images)
    errors = caught.value.errors
    assert [errors[image].violations[0].field for image in (4, 5)] == ["images[4].encoded", "images[5].views[1].crop"]

    features = client.extract(images, on_error="return", preset="hf", dtype="float32")
    assert features.images.tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert features.views.tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert set(features.errors) == {4, 5}
    assert [row.error is not None for row in features] == [False] * 4 + [True] * 3
    assert features.patches is not None
    assert not features.patches[4:].any()
    assert all(features.patches[row].any() for row in range(4))


def test_a_failure_of_a_part_names_the_fields_of_the_call(server: FakeServer) -> None:
    found = split([LoadedImage(photo())] * 6, check_options(), server.model)
    error = InvalidRequest(
        "no",
        violations=(FieldViolation("images[1].views[2].size", "no"), FieldViolation("outputs.layers[1]", "neither")),
    )
    assert found[1].of_the_call(error) is error
    assert error.violations == (
        FieldViolation("images[4].views[2].size", "no"),
        FieldViolation("outputs.layers[1]", "neither"),
    )


def test_a_part_that_fails_fails_the_call(client: Client, server: FakeServer) -> None:
    server.script = [None, Failure(grpc.StatusCode.INVALID_ARGUMENT, "no", field="images[0].encoded")]
    with pytest.raises(InvalidRequest, match=r"^no$") as caught:
        client.extract([png(photo(seed=seed)) for seed in range(6)])
    # Which of the parts the script's second step met, connections decide.
    assert caught.value.violations[0].field in {"images[0].encoded", "images[3].encoded"}


def test_a_single_image_over_a_limit_is_refused_by_the_server(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"5 images .* \(each view counts as one\); allowed are 1 to 4"):
        client.extract(ImageViews(photo(), [View()] * 5))


def test_answers_of_two_models_are_not_joined(server: FakeServer) -> None:
    found = split([LoadedImage(photo())] * 5, check_options("cls"), server.model)
    answers = [read(answer(query.message, server.model, {}, {}).SerializeToString(), query) for query in found]
    assert len(join(found, answers, "raise")) == 5
    other = replace(answers[1], fingerprint="cafe")
    with pytest.raises(InvalidResponse, match="answered by several models, of the fingerprints f00d, cafe"):
        join(found, [answers[0], other], "raise")


def test_a_model_that_changes_between_the_parts_is_noticed(client: Client, server: FakeServer) -> None:
    client.extract(photo())
    server.model = replace(server.model, fingerprint="cafe")
    assert client.extract([photo()] * 5).fingerprint == "cafe"  # all parts anew
    with Client(server.target, fingerprint="f00d") as pinned, pytest.raises(ModelMismatch):
        pinned.extract([photo()] * 5)
