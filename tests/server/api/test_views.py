"""Views over the wire: the rows of one request, and the features of exactly their pixels."""

from __future__ import annotations

import asyncio
import io
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from dinov3_server.api import sources
from dinov3_server.api.budget import ByteBudget
from dinov3_server.engine.forecast import Demand
from dinov3_server.engine.shares import ANONYMOUS
from dinov3_server.errors import DeadlineExceeded, InternalError
from dinov3_server.images import decode
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import Output
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import (
    AS_IS,
    FakeEngine,
    encoded,
    extraction,
    failure_of_status,
    features,
    picture,
    png,
    request_memory,
    serving,
    tensor,
)
from tests.support.waiting import LIMIT, until_async

RESAMPLING = {
    pb.INTERPOLATION_NEAREST: Image.Resampling.NEAREST,
    pb.INTERPOLATION_BILINEAR: Image.Resampling.BILINEAR,
    pb.INTERPOLATION_BICUBIC: Image.Resampling.BICUBIC,
    pb.INTERPOLATION_LANCZOS: Image.Resampling.LANCZOS,
}
Size = tuple[int, int]
Crop = tuple[int, int, int, int]


class V(NamedTuple):
    """A view as the client has it. `crop` is (top, left, height, width), `size` is (height, width)."""

    crop: Crop | None = None
    flip: bool = False
    size: Size | None = None
    interpolation: pb.Interpolation = pb.INTERPOLATION_UNSPECIFIED

    @property
    def message(self) -> pb.View:
        view = pb.View(horizontal_flip=self.flip, interpolation=self.interpolation)
        if self.crop is not None:
            view.crop.CopyFrom(pb.Box(top=self.crop[0], left=self.crop[1], height=self.crop[2], width=self.crop[3]))
        if self.size is not None:
            view.size.CopyFrom(pb.Size(height=self.size[0], width=self.size[1]))
        return view


def at_the_client(image: Image.Image, view: V, size: Size | None = (256, 256)) -> np.ndarray:
    """The same steps by Pillow; `size` and bilinear are what the request says for views that say nothing."""
    if view.crop is not None:
        top, left, height, width = view.crop
        image = image.crop((left, top, left + width, top + height))
    size = view.size or size
    if size is not None:
        image = image.resize(size[::-1], RESAMPLING[view.interpolation or pb.INTERPOLATION_BILINEAR])
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def with_views(image: pb.Image, views: Sequence[V]) -> pb.Image:
    image.views.extend(view.message for view in views)
    return image


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def cls_of(pixels: np.ndarray) -> bytes:
    return features(pixels.tobytes(), Output("cls"), 48)


def rows(answer: pb.ExtractResponse) -> dict[tuple[int, int], tuple[Size, bytes]]:
    """By image and view: the input size and CLS. Having checked the order of rows and blocks."""
    found: dict[tuple[int, int], tuple[Size, bytes]] = {}
    for block in answer.blocks:
        keys = list(zip(block.image_indices, block.view_indices or [0] * len(block.image_indices), strict=True))
        assert keys == sorted(keys)
        size = (block.input_size.height, block.input_size.width)
        step = len(block.cls.data) // len(keys)
        assert list(block.cls.shape) == [len(keys), 24]
        for row, key in enumerate(keys):
            assert key not in found
            found[key] = size, block.cls.data[row * step : (row + 1) * step]
    firsts = [min(zip(b.image_indices, b.view_indices or b.image_indices, strict=True)) for b in answer.blocks]
    assert firsts == sorted(firsts)
    return found


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each file is decoded."""
    counter = Counter[bytes]()
    real = decode.decode

    def counted(data: bytes, **options: Any) -> Image.Image:
        counter[data] += 1
        return real(data, **options)

    monkeypatch.setattr(decode, "decode", counted)
    return counter


async def test_two_at_224_and_eight_at_96_of_every_image(decodes: Counter[bytes]) -> None:
    photos = [picture(120, 160, seed) for seed in range(3)]
    files = [jpeg(photos[0]), png(photos[1])]
    images = [opened(files[0]), opened(files[1]), Image.fromarray(photos[2])]
    sent = [pb.Image(encoded=files[0]), pb.Image(encoded=files[1]), pb.Image(pixels=tensor(photos[2]))]
    draws = np.random.default_rng(0)

    def crop(size: int) -> V:
        height, width = (int(draws.integers(20, most + 1)) for most in (120, 160))
        top, left = int(draws.integers(0, 121 - height)), int(draws.integers(0, 161 - width))
        return V((top, left, height, width), bool(draws.integers(2)), (size, size), pb.INTERPOLATION_BICUBIC)

    views = [[crop(224), crop(224), *(crop(96) for _ in range(8))] for _ in sent]
    async with serving() as rig:
        request = pb.ExtractRequest(images=list(map(with_views, sent, views)), outputs=pb.Outputs(cls=True))
        answer = await rig.stub.Extract(request)
        assert [(b.input_size.height, b.grid_width) for b in answer.blocks] == [(224, 14), (96, 6)]
        assert list(answer.blocks[0].image_indices) == [0, 0, 1, 1, 2, 2]
        assert list(answer.blocks[0].view_indices) == [0, 1] * 3
        assert list(answer.blocks[1].image_indices) == [0] * 8 + [1] * 8 + [2] * 8
        assert list(answer.blocks[1].view_indices) == list(range(2, 10)) * 3
        assert rows(answer) == {
            (image, view): (how.size, cls_of(at_the_client(images[image], how)))
            for image in range(3)
            for view, how in enumerate(views[image])
        }
        assert not answer.errors
        assert decodes == {files[0]: 1, files[1]: 1}
        assert rig.count("dinov3_images_total", "ok") == 30
        assert rig.count("dinov3_stage_seconds", "decode") == 3


def random_views(draws: np.random.Generator, height: int, width: int) -> list[V]:
    views = []
    for _ in range(int(draws.integers(1, 6))):
        h, w = int(draws.integers(1, height + 1)), int(draws.integers(1, width + 1))
        box = int(draws.integers(0, height - h + 1)), int(draws.integers(0, width - w + 1)), h, w
        size = int(draws.choice([16, 32, 48])), int(draws.choice([16, 32]))
        filter = pb.Interpolation.values()[int(draws.integers(5))]
        views.append(
            V(
                box if draws.integers(4) else None,
                bool(draws.integers(2)),
                size if draws.integers(4) else None,
                filter,
            )
        )
    return views


@pytest.mark.parametrize("seed", range(8))
async def test_any_views_of_any_images(seed: int) -> None:
    """Files and tensors, with and without views, many sizes: each row is of its own pixels."""
    draws = np.random.default_rng(seed)
    preprocessing = pb.Preprocessing(size=pb.Size(height=48, width=64))
    sent, expected = [], {}
    for index in range(6):
        height, width = int(draws.integers(10, 80)), int(draws.integers(10, 80))
        pixels = picture(height, width, 100 * seed + index)
        kind = int(draws.integers(3))
        data = jpeg(pixels) if kind == 1 else png(pixels)
        image = Image.fromarray(pixels) if kind == 0 else opened(data)
        views = random_views(draws, height, width) if draws.integers(4) else []
        message = pb.Image(pixels=tensor(pixels)) if kind == 0 else pb.Image(encoded=data)
        sent.append(with_views(message, views))
        for view, how in enumerate(views or [V()]):
            shown = at_the_client(image, how, (48, 64))
            expected[index, view] = shown.shape[:2], cls_of(shown)
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=sent, preprocessing=preprocessing))
        assert rows(answer) == expected
        assert rig.count("dinov3_images_total", "ok") == len(expected)


async def test_images_with_and_without_views_in_one_request() -> None:
    photos = [picture(40, 40, seed) for seed in range(4)]
    images = [encoded(photo) for photo in photos]
    with_views(images[2], [V(size=(32, 32)), V(size=(16, 16)), V(flip=True, size=(32, 32))])
    size = pb.Preprocessing(size=pb.Size(height=32, width=32))
    floats = np.ascontiguousarray(picture(32, 32, 9).transpose(2, 0, 1), dtype=np.float32)
    images.insert(2, pb.Image(pixels=tensor(floats)))
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=images, preprocessing=size))
        # Float and uint8 pixels of one size are one block.
        assert [list(block.image_indices) for block in answer.blocks] == [[0, 1, 2, 3, 3, 4], [3]]
        assert [list(block.view_indices) for block in answer.blocks] == [[0, 0, 0, 0, 2, 0], [1]]
        found = rows(answer)
        assert found[2, 0][1] == features(floats.tobytes(), Output("cls"), 48)
        assert found[3, 2][1] == cls_of(at_the_client(Image.fromarray(photos[2]), V(flip=True), (32, 32)))
        assert found[4, 0][1] == cls_of(at_the_client(Image.fromarray(photos[3]), V(), (32, 32)))


async def test_without_views_there_are_no_view_indices() -> None:
    async with serving() as rig:
        for request in (
            pb.ExtractRequest(images=[encoded(picture(9, 9))] * 3),
            pb.ExtractRequest(pixels=tensor(picture(16, 16)[None]), preprocessing=AS_IS),
        ):
            [block] = (await rig.stub.Extract(request)).blocks
            assert not block.view_indices


@pytest.mark.parametrize("form", ["file", "tensor"])
async def test_what_a_view_leaves_out(form: str) -> None:
    """Preset none: the crop as it is, else the whole picture as it is. The filter is the request's."""
    pixels = picture(48, 64)
    views = [V(), V(crop=(3, 5, 32, 16)), V(flip=True), V(crop=(0, 1, 40, 30), size=(16, 16)), V(crop=(0, 0, 48, 64))]
    image = encoded(pixels) if form == "file" else pb.Image(pixels=tensor(pixels))
    how = pb.Preprocessing(preset=pb.PRESET_NONE, interpolation=pb.INTERPOLATION_LANCZOS)
    async with serving() as rig:
        request = pb.ExtractRequest(images=[with_views(image, views)], preprocessing=how)
        found = rows(await rig.stub.Extract(request))
        assert [found[0, view][0] for view in range(5)] == [(48, 64), (32, 16), (48, 64), (16, 16), (48, 64)]
        for view, given in enumerate(views):
            given = given._replace(interpolation=pb.INTERPOLATION_LANCZOS)
            assert found[0, view][1] == cls_of(at_the_client(Image.fromarray(pixels), given, None))


async def test_the_picture_is_upright_before_it_is_cropped() -> None:
    pixels = picture(40, 60)
    file, tags = io.BytesIO(), Image.Exif()
    tags[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(pixels).save(file, "PNG", exif=tags)
    views = [V((20, 0, 40, 30), size=(16, 16)), V()]  # the box lies in 60x40, and not in 40x60
    image = with_views(pb.Image(encoded=file.getvalue()), views)
    how = pb.Preprocessing(size=pb.Size(height=32, width=32), apply_exif_orientation=True)
    async with serving() as rig:
        found = rows(await rig.stub.Extract(pb.ExtractRequest(images=[image], preprocessing=how)))
        upright = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, -1)))
        assert found[0, 0][1] == cls_of(at_the_client(upright, views[0]))
        assert found[0, 1][1] == cls_of(at_the_client(upright, views[1], (32, 32)))
        how.apply_exif_orientation = False
        answer = await rig.stub.Extract(pb.ExtractRequest(images=[image], preprocessing=how))
        [error] = answer.errors
        assert "40x60 (height x width): top + height is 60, allowed are up to 40" in error.status.message


FILE, PIXELS = encoded(picture(40, 50)), pb.Image(pixels=tensor(picture(40, 50)))
SMALL = pb.Preprocessing(size=pb.Size(height=16, width=16))
GOOD = V((0, 0, 20, 20), size=(32, 32))
# What is at fault with view 1 of three; the field within it; the message; the views that have a row.
Case = tuple[pb.Image, V | pb.View, pb.Preprocessing, str, str, list[int]]
BAD_VIEWS: dict[str, Case] = {
    "box beyond a file": (FILE, V((30, 0, 20, 9)), SMALL, ".crop", "is 40x50 .*: top . height is 50", [0, 1, 2]),
    "box beyond a tensor": (PIXELS, V((0, 1, 9, 50)), SMALL, ".crop", "is 40x50 .*: left . width is 51", [0, 1, 2]),
    "box beyond, as it is": (PIXELS, V((0, 48, 16, 16)), AS_IS, ".crop", "left . width is 64", [0, 1, 2]),
    "empty box": (FILE, V((1, 2, 0, 4)), SMALL, ".crop", "top 1, left 2, height 0, width 4 has no pixels", [0, 1, 2]),
    "empty box, as it is": (FILE, V((1, 2, 0, 4)), AS_IS, ".crop", "has no pixels", [0, 2]),
    "no multiple": (FILE, V(size=(32, 100)), SMALL, ".size", "width 100 is not .nearest: 96 or 112", [0, 2]),
    "half a size": (FILE, V(size=(32, 0)), SMALL, ".size", "width 0 is not", [0, 2]),
    "box of no multiple": (FILE, V((0, 0, 20, 32)), AS_IS, ".crop", "height 20 is not", [0, 2]),
    "whole file of no multiple": (FILE, V(), AS_IS, "", "of 40x50 .*height 40 is not", [0, 2]),
    "whole tensor of no multiple": (PIXELS, V(flip=True), AS_IS, "", "of 40x50 .*height 40 is not", [0, 2]),
    "tokens": (FILE, V(size=(1600, 16)), SMALL, ".size", "105 tokens .*allowed are 100", [0, 2]),
    "interpolation": (FILE, pb.View(interpolation=9), SMALL, ".interpolation", "9; allowed .*_LANCZOS", [0, 1, 2]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BAD_VIEWS)
async def test_an_error_of_a_view_is_its_image_s(name: str) -> None:
    image, bad, preprocessing, field, message, present = BAD_VIEWS[name]
    image = with_views(pb.Image.FromString(image.SerializeToString()), [GOOD])
    image.views.append(bad.message if isinstance(bad, V) else bad)
    image.views.append(GOOD._replace(flip=True).message)
    good = with_views(encoded(picture(40, 40, 7)), [GOOD, GOOD])
    async with serving(max_batch_tokens=100) as rig:
        request = pb.ExtractRequest(images=[good, image, good], preprocessing=preprocessing)
        answer = await rig.stub.Extract(request)
        [error] = answer.errors
        assert error.image_index == 1
        told = failure_of_status(error.status)
        assert told.code.name == "INVALID_ARGUMENT"
        assert told.field == f"images[1].views[1]{field}"
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(told.message)
        found = rows(answer)
        assert [view for index, view in sorted(found) if index == 1] == present
        assert not any(any(found[1, view][1]) for view in present)
        shown = cls_of(at_the_client(Image.fromarray(picture(40, 40, 7)), GOOD))
        assert [found[index, view][1] for index in (0, 2) for view in (0, 1)] == [shown] * 4
        assert rig.count("dinov3_images_total", "ok") == 4
        assert rig.count("dinov3_images_total", "invalid") == 3


async def test_of_several_errors_the_first_is_told() -> None:
    image = with_views(encoded(picture(40, 40)), [V((0, 0, 0, 1)), V(size=(1, 1)), V((0, 0, 41, 1))])
    async with serving() as rig:
        [error] = (await rig.stub.Extract(pb.ExtractRequest(images=[image]))).errors
        assert failure_of_status(error.status).field == "images[0].views[0].crop"


BROKEN: dict[str, tuple[pb.Image, str, bool]] = {
    "file": (pb.Image(encoded=png(picture(40, 40))[:-900]), "images[1].encoded", True),
    "nothing": (pb.Image(), "images[1]", True),
    "no tensor": (pb.Image(pixels=pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=[4, 4, 3])), "images[1].pixels.data", True),
    "floats": (pb.Image(pixels=tensor(np.zeros((3, 16, 16), np.float32))), "images[1].views", False),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_image_with_views_among_good_ones(name: str) -> None:
    image, field, has_rows = BROKEN[name]
    views = [V(size=(32, 32)), V((0, 0, 5, 5)), V(size=(48, 48))]
    broken = with_views(pb.Image.FromString(image.SerializeToString()), views)
    photo = picture(40, 40)
    async with serving() as rig:
        images = [with_views(encoded(photo), views), broken, encoded(photo)]
        answer = await rig.stub.Extract(pb.ExtractRequest(images=images, preprocessing=SMALL))
        [error] = answer.errors
        assert (error.image_index, failure_of_status(error.status).field) == (1, field)
        found = rows(answer)
        sizes = [(32, 32), (16, 16), (48, 48)]
        assert [found[key][0] for key in sorted(found) if key[0] == 1] == (sizes if has_rows else [])
        assert all(any(cls) == (key[0] != 1) for key, (_, cls) in found.items())
        for view, how in enumerate(views):
            assert found[0, view][1] == cls_of(at_the_client(Image.fromarray(photo), how, (16, 16)))
        assert rig.count("dinov3_images_total", "ok") == 4
        assert rig.count("dinov3_images_total", "invalid") == 3


async def test_an_unreadable_file_whose_size_would_count_has_rows_for_the_views_that_say_theirs() -> None:
    views = [V(), V(size=(32, 32)), V((0, 0, 16, 16))]
    image = with_views(pb.Image(encoded=b"no image"), views)
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=[image], preprocessing=AS_IS))
        assert {key: size for key, (size, _) in rows(answer).items()} == {(0, 1): (32, 32), (0, 2): (16, 16)}
        assert [error.image_index for error in answer.errors] == [0]


async def test_a_row_that_the_engine_fails_takes_its_image_s_views_along() -> None:
    views = [V(size=(32, 32)), V(size=(16, 16)), V(size=(32, 32), flip=True)]
    images = [with_views(encoded(picture(40, 40, seed)), views) for seed in range(2)]
    async with serving() as rig:
        # Row 3 of the larger size is view 2 of image 1; the smaller has no such row.
        rig.engine.bad_rows = {3: InternalError("features are not finite")}
        answer = await rig.stub.Extract(pb.ExtractRequest(images=images))
        [error] = answer.errors
        assert error.image_index == 1
        assert failure_of_status(error.status).code.name == "INTERNAL"
        found = rows(answer)
        assert [any(found[key][1]) for key in sorted(found)] == [True] * 3 + [False] * 3
        assert not any(answer.blocks[0].patches.data[2 * 4 * 48 :])
        assert rig.count("dinov3_images_total", "ok") == 3
        assert rig.count("dinov3_images_total", "failed") == 3


async def test_limits_count_views() -> None:
    image = with_views(encoded(picture(16, 16)), [V()] * 4)
    async with serving(max_images_per_request=8) as rig:
        await rig.stub.Extract(pb.ExtractRequest(images=[image, image], outputs=pb.Outputs(cls=True)))
        error = await rig.error(pb.ExtractRequest(images=[image, image, encoded(picture(16, 16))]))
        assert error.field == "images"
        assert "9 images in one request (each view counts as one); allowed are 1 to 8" in error.message
        assert rig.count("dinov3_images_total", "ok") == 8
        assert rig.count("dinov3_images_total", "invalid") == 8  # no more than could have been


async def test_room_is_reserved_for_every_view_before_the_file_is_decoded(decodes: Counter[bytes]) -> None:
    image = with_views(encoded(picture(16, 16)), [V(size=(32, 32)), V(size=(16, 16)), V(size=(32, 32))])
    async with serving() as rig:
        asked: list[int] = []
        reserve = rig.engine.reserve

        def counted(demand: Demand, deadline: float | None) -> Any:
            assert not decodes
            asked.append(demand.images)
            return reserve(demand, deadline)

        rig.engine.reserve = counted  # type: ignore[method-assign]
        await rig.stub.Extract(pb.ExtractRequest(images=[image, encoded(picture(9, 9))]))
        assert asked == [4]
        assert sum(decodes.values()) == 2


async def test_an_answer_of_many_views_over_the_limit_is_refused_before_any_work(decodes: Counter[bytes]) -> None:
    image = with_views(encoded(picture(16, 16)), [V()] * 100)
    async with serving(max_message_bytes=2**20) as rig:
        error = await rig.error(pb.ExtractRequest(images=[image]))
        assert error.field == "outputs"
        assert "100 image(s) of 256x256" in error.message
        assert not decodes


async def test_in_a_stream() -> None:
    photos = [picture(40, 50, seed) for seed in range(4)]
    views = [V((1, 2, 30, 40), flip=True, size=(16, 32)), V(size=(32, 32))]

    def message(index: int) -> pb.ExtractStreamRequest:
        images = [with_views(encoded(photos[index]), views)]
        return pb.ExtractStreamRequest(id=index, request=pb.ExtractRequest(images=images))

    async with serving() as rig:
        answers = {}
        async for answer in rig.stub.ExtractStream(message(index) for index in range(4)):
            answers[answer.id] = rows(answer.response)
        for index, photo in enumerate(photos):
            for view, how in enumerate(views):
                shown = at_the_client(Image.fromarray(photo), how)
                assert answers[index][0, view] == (how.size, cls_of(shown))


# --- threads -------------------------------------------------------------------------------------


async def test_views_that_are_only_copied_take_no_thread() -> None:
    engine = FakeEngine()
    service = extraction(engine, Metrics())
    service.close()  # no thread is left that could do it
    photo = picture(48, 64)
    views = [V((1, 2, 32, 32), flip=True), V((0, 0, 32, 32), size=(32, 32)), V(flip=True, size=(48, 64))]
    image = with_views(pb.Image(pixels=tensor(photo)), views)
    answer = await service.extract(
        pb.ExtractRequest(images=[image], preprocessing=AS_IS), None, ANONYMOUS, request_memory()
    )
    found = rows(pb.ExtractResponse.FromString(answer))
    for view, how in enumerate(views):
        assert found[0, view][1] == cls_of(at_the_client(Image.fromarray(photo), how, None))
    image.views.append(V((0, 0, 32, 32), size=(16, 16)).message)
    with pytest.raises(RuntimeError, match="after shutdown"):
        await service.extract(pb.ExtractRequest(images=[image], preprocessing=AS_IS), None, ANONYMOUS, request_memory())


class Gate:
    """In place of `transform_into`: a thread stops before it writes its second row, until the gate is open."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._write = sources.transform_into
        self.entered = asyncio.Event()
        self.open = threading.Event()
        self.calls = 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            self._loop.call_soon_threadsafe(self.entered.set)
            assert self.open.wait(LIMIT)
        self._write(*args)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: list[Gate] = []

    def make() -> Gate:
        made.append(Gate())
        monkeypatch.setattr(sources, "transform_into", made[0])
        return made[0]

    yield make
    for each in made:
        each.open.set()


FIVE = pb.ExtractRequest(images=[with_views(encoded(picture(40, 40, seed)), [V(size=(32, 32))] * 5) for seed in (0, 1)])


async def test_a_caller_that_leaves_between_two_views(gate: Any, decodes: Counter[bytes]) -> None:
    stop, engine, metrics = gate(), FakeEngine(), Metrics()
    service = extraction(engine, metrics)
    task = asyncio.create_task(service.extract(FIVE, None, ANONYMOUS, request_memory()))
    await stop.entered.wait()
    task.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    assert len(engine.reservations) == 1
    stop.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stop.calls == 2  # the row that was begun was ended, no other begun
    assert sum(decodes.values()) == 1
    assert engine.untouched()  # nothing was written after the release
    assert not engine.done_runs
    assert metrics.snapshot().series["dinov3_images_total"] == {("cancelled",): (10.0,)}
    service.close()


async def test_a_deadline_that_passes_between_two_views(gate: Any) -> None:
    stop, engine, metrics = gate(), FakeEngine(), Metrics()
    service = extraction(engine, metrics)
    deadline = time.monotonic() + 0.2
    task = asyncio.create_task(service.extract(FIVE, deadline, ANONYMOUS, request_memory()))
    await stop.entered.wait()
    await until_async(lambda: time.monotonic() >= deadline)
    stop.open.set()
    with pytest.raises(DeadlineExceeded, match="while the images of the request were being decoded"):
        await task
    assert stop.calls == 2
    assert engine.untouched()
    assert metrics.snapshot().series["dinov3_images_total"] == {("expired",): (10.0,)}
    service.close()


def colour(of: int) -> pb.Image:
    """An image whose rows say whose they are."""
    return encoded(np.full((20, 20, 3), of, np.uint8))


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Turns of a thread take no time at all: a row each. The colours of the rows, as they are written."""
    monkeypatch.setattr("dinov3_server.api.decode_pool.SLICE_SECONDS", 0.0)
    order: list[int] = []
    write = sources.transform_into

    def recorded(image: Image.Image, *rest: Any) -> None:
        order.append(image.getpixel((0, 0))[0])  # type: ignore[index,arg-type]
        write(image, *rest)

    monkeypatch.setattr(sources, "transform_into", recorded)
    return order


SIXTEEN = V(size=(16, 16))


async def test_an_image_of_many_views_does_not_keep_others_from_the_threads(
    turns: list[int], decodes: Counter[bytes]
) -> None:
    engine = FakeEngine()
    service = extraction(engine, Metrics())
    large = pb.ExtractRequest(images=[with_views(colour(1), [SIXTEEN] * 20)])
    small = pb.ExtractRequest(images=[with_views(colour(2), [SIXTEEN])])
    answers = await asyncio.gather(
        service.extract(large, None, ANONYMOUS, request_memory()),
        service.extract(small, None, ANONYMOUS, request_memory()),
    )
    assert sorted(turns) == [1] * 20 + [2]
    assert turns.index(2) <= 2
    assert sorted(decodes.values()) == [1, 1]  # its picture waited, and was not decoded again
    pixels = at_the_client(Image.new("RGB", (20, 20), (1, 1, 1)), SIXTEEN)
    assert {cls for _, cls in rows(pb.ExtractResponse.FromString(answers[0])).values()} == {cls_of(pixels)}
    service.close()


def room_for_one_picture() -> ByteBudget:
    """A small file's cost is 1 MiB and what its pixels take."""
    budget = ByteBudget(3 << 20, 3 << 19 >> 1)
    assert 1 << 20 < budget.pictures.limit < 2 << 20
    return budget


async def test_a_picture_has_its_room_until_its_last_row_is_written(turns: list[int], decodes: Counter[bytes]) -> None:
    engine, budget = FakeEngine(), room_for_one_picture()
    service = extraction(engine, Metrics(), threads=2, budget=budget)
    requests = [pb.ExtractRequest(images=[with_views(colour(of), [SIXTEEN] * 6)]) for of in (1, 2, 3)]
    for times in (1, 2):
        turns.clear()
        await asyncio.gather(*(service.extract(request, None, ANONYMOUS, request_memory()) for request in requests))
        assert sorted(turns) == [1] * 6 + [2] * 6 + [3] * 6
        assert sum(before != after for before, after in itertools.pairwise(turns)) == 2  # one after the other
        assert set(decodes.values()) == {times}
        assert budget.pictures.used == 0
    service.close()


async def test_a_caller_that_leaves_gives_the_room_of_its_picture_back(turns: list[int]) -> None:
    engine, budget = FakeEngine(), room_for_one_picture()
    service = extraction(engine, Metrics(), budget=budget)
    request = pb.ExtractRequest(images=[with_views(colour(1), [SIXTEEN] * 400)], outputs=pb.Outputs(cls=True))
    waiting = pb.ExtractRequest(images=[with_views(colour(2), [SIXTEEN])])
    for _ in range(2):
        task = asyncio.create_task(service.extract(request, None, ANONYMOUS, request_memory()))
        await until_async(lambda: len(turns) >= 3)
        other = asyncio.create_task(service.extract(waiting, None, ANONYMOUS, request_memory()))
        await until_async(lambda: budget.pictures.has_waiters)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await other
        assert engine.untouched()
        assert budget.pictures.used == 0
        assert turns.count(1) < 400
        assert turns[-1] == 2
        turns.clear()
    service.close()


async def test_a_caller_that_leaves_while_it_waits_for_room(turns: list[int]) -> None:
    engine, budget = FakeEngine(), room_for_one_picture()
    service = extraction(engine, Metrics(), budget=budget)
    held = budget.pictures.try_acquire(budget.pictures.limit)
    assert held
    request = pb.ExtractRequest(images=[with_views(colour(1), [SIXTEEN])])
    task = asyncio.create_task(service.extract(request, None, ANONYMOUS, request_memory()))
    await until_async(lambda: budget.pictures.has_waiters)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not turns
    assert not budget.pictures.has_waiters
    assert engine.untouched()
    held.release()
    service.close()
