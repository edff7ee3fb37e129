"""Views over the wire: each row has the features of exactly its pixels."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3_server.engine.forecast import Demand
from dinov3_server.models.interface import Output
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import (
    AS_IS,
    encoded,
    features,
    picture,
    png,
    serving,
    tensor,
)
from tests.server.api.views import V, at_the_client, cls_of, jpeg, opened, rows, with_views


async def test_two_views_at_224_and_eight_at_96_of_every_image(decodes: Counter[bytes]) -> None:
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
async def test_options_that_a_view_leaves_out(form: str) -> None:
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


async def test_every_view_is_reserved_before_the_file_is_decoded(decodes: Counter[bytes]) -> None:
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


async def test_views_in_a_stream() -> None:
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
