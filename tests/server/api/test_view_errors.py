"""Errors of views and of images with views, and limits that count views."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dinov3_server.errors import InternalError
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import (
    AS_IS,
    encoded,
    failure_of_status,
    picture,
    png,
    serving,
    tensor,
)
from tests.server.api.views import SMALL, V, at_the_client, cls_of, rows, with_views

FILE, PIXELS = encoded(picture(40, 50)), pb.Image(pixels=tensor(picture(40, 50)))
GOOD = V((0, 0, 20, 20), size=(32, 32))
# An image, the invalid view 1 of three, preprocessing; the field in the view, the message, the views with a row.
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
async def test_an_error_of_a_view_fails_its_image(name: str) -> None:
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
        failure = failure_of_status(error.status)
        assert failure.code.name == "INVALID_ARGUMENT"
        assert failure.field == f"images[1].views[1]{field}"
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(failure.message)
        found = rows(answer)
        assert [view for index, view in sorted(found) if index == 1] == present
        assert not any(any(found[1, view][1]) for view in present)
        shown = cls_of(at_the_client(Image.fromarray(picture(40, 40, 7)), GOOD))
        assert [found[index, view][1] for index in (0, 2) for view in (0, 1)] == [shown] * 4
        assert rig.count("dinov3_images_total", "ok") == 4
        assert rig.count("dinov3_images_total", "invalid") == 3


async def test_the_first_of_several_errors_is_reported() -> None:
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
async def test_a_broken_image_with_views_fails_alone(name: str) -> None:
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


async def test_an_unreadable_file_has_rows_for_views_with_a_size() -> None:
    views = [V(), V(size=(32, 32)), V((0, 0, 16, 16))]
    image = with_views(pb.Image(encoded=b"no image"), views)
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=[image], preprocessing=AS_IS))
        assert {key: size for key, (size, _) in rows(answer).items()} == {(0, 1): (32, 32), (0, 2): (16, 16)}
        assert [error.image_index for error in answer.errors] == [0]


async def test_a_row_that_the_engine_fails_fails_all_views_of_its_image() -> None:
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
