"""The fake server answers like the real one: the same shapes, fields, order of rows and errors, with the same messages.

Every request goes to a real server (numpy runner) and to a fake one of the same model. All of the answer is compared
but numbers, timings, and messages about the contents of files, which are those of the decoders.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from PIL import Image

from dinov3_client import Client
from dinov3_client.testing import FakeServer
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.feature_service_pb2_grpc import FeatureServiceStub
from tests.client.test_testing import AS_IS, picture, png, tensor
from tests.support.server import Server
from tests.support.waiting import LIMIT

FLAGS = ("--max-images-per-request", "6", "--max-message-bytes", "1MiB", "--max-batch-tokens", "1024")
FLAGS += ("--max-image-pixels", "40000")


PROJECTIONS = {"p8": np.ones((8, 64), np.float32), "narrow": np.ones((4, 32), np.float32)}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Stubs of the real server and of the fake one."""
    folder = tmp_path_factory.mktemp("projections")
    for name, weight in PROJECTIONS.items():
        np.save(folder / f"{name}.npy", weight)
    named = ",".join(f"{name}={folder}/{name}.npy" for name in PROJECTIONS)
    options = [("grpc.max_receive_message_length", -1)]
    with (
        Server(*FLAGS, "--projections", named) as real,
        Client(real.grpc) as client,
        FakeServer(client.model(), projections=PROJECTIONS) as fake,
        grpc.insecure_channel(real.grpc, options) as one,
        grpc.insecure_channel(fake.target, options) as other,
    ):
        yield FeatureServiceStub(one), FeatureServiceStub(other)  # type: ignore[no-untyped-call]


def size(height: int, width: int | None = None) -> pb.Size:
    return pb.Size(height=height, width=height if width is None else width)


def resized(height: int, width: int | None = None, **options: Any) -> pb.Preprocessing:
    return pb.Preprocessing(size=size(height, width), **options)


CROP, PAD = pb.Fit(method=pb.FIT_METHOD_CROP), pb.Fit(method=pb.FIT_METHOD_PAD)
RED = pb.Fit(method=pb.FIT_METHOD_PAD, pad_color=pb.Color(red=9))


def file(height: int = 40, width: int = 50, *views: pb.View) -> pb.Image:
    return pb.Image(encoded=png(picture(height, width)), views=views)


def pixels(height: int = 32, width: int = 48, *views: pb.View) -> pb.Image:
    return pb.Image(pixels=tensor(picture(height, width)), views=views)


def floats(height: int = 32, width: int = 48, first: float = 0.0) -> pb.Tensor:
    values = (picture(height, width) / 255).transpose(2, 0, 1).astype(np.float32)
    values[0, 0, 0] = first
    return tensor(values)


def crop(top: int, left: int, height: int, width: int, **options: Any) -> pb.View:
    return pb.View(crop=pb.Box(top=top, left=left, height=height, width=width), **options)


def ask(*images: pb.Image, preprocessing: pb.Preprocessing = AS_IS, **fields: Any) -> pb.ExtractRequest:
    return pb.ExtractRequest(images=images or [pixels()], preprocessing=preprocessing, **fields)


def wants(**outputs: Any) -> pb.ExtractRequest:
    return ask(pixels(), pixels(), outputs=pb.Outputs(**outputs))


def layers(*entries: pb.LayerOutputs) -> pb.ExtractRequest:
    return wants(layers=entries)


def layers_projected(*entries: pb.LayerOutputs) -> pb.ExtractRequest:
    return wants(layers=entries, projection="narrow")


def saved(format: str, mode: str = "RGB", **options: Any) -> pb.Image:
    file, image = io.BytesIO(), Image.fromarray(picture(48, 64))
    if mode == "RGBA":
        image.putalpha(image.convert("L"))
    image.save(file, format, **options)
    return pb.Image(encoded=file.getvalue())


TURNED = Image.Exif()
TURNED[0x0112] = 6
UPRIGHT = pb.Preprocessing(preset=pb.PRESET_NONE, apply_exif_orientation=True)

BROKEN = pb.Image(encoded=b"\xff\xd8\xff broken")
LAYER, POOL = pb.LayerOutputs, pb.Pooling
SHORT = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=[32, 48, 3], data=b"short")

REQUESTS: dict[str, pb.ExtractRequest] = {
    "nothing": pb.ExtractRequest(),
    "defaults": pb.ExtractRequest(images=[file(), pixels(), file(9, 9)]),
    "preset hf": ask(file(), preprocessing=pb.Preprocessing(preset=pb.PRESET_HF)),
    "size": ask(file(), pixels(), preprocessing=resized(64, 32)),
    "packed": pb.ExtractRequest(pixels=tensor(np.stack([picture(32, 48)] * 3)), preprocessing=AS_IS),
    "packed, resized": pb.ExtractRequest(pixels=tensor(np.stack([picture(33, 48)] * 3)), preprocessing=resized(64)),
    "packed floats": pb.ExtractRequest(pixels=tensor(np.ones((2, 3, 32, 48), np.float32))),
    "packed floats, one not finite": pb.ExtractRequest(
        pixels=tensor(np.array([1, np.nan], np.float32)[:, None, None, None] * np.ones((2, 3, 32, 48), np.float32))
    ),
    "packed of no size": pb.ExtractRequest(pixels=tensor(np.stack([picture(33, 48)] * 3)), preprocessing=AS_IS),
    "packed, wrong bytes": pb.ExtractRequest(
        pixels=pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=[2, 16, 16, 3], data=b"12"), preprocessing=AS_IS
    ),
    "packed, wrong dtype": pb.ExtractRequest(pixels=pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[2, 16, 16, 3])),
    "packed, wrong shape": pb.ExtractRequest(pixels=tensor(picture(16, 16))),
    "both": ask(pixels(), pixels=tensor(np.zeros((1, 16, 16, 3), np.uint8))),
    "several sizes": ask(pixels(32, 32), pixels(16, 48), file(32, 32), pb.Image(pixels=floats(16, 48)), pixels(32, 32)),
    "too many": ask(*[pixels()] * 7),
    "too many packed": pb.ExtractRequest(pixels=tensor(np.zeros((7, 16, 16, 3), np.uint8))),
    "too many views": ask(pixels(32, 48, *[pb.View()] * 4), pixels(32, 48, *[pb.View()] * 3)),
    "no multiple": ask(file(), preprocessing=resized(100)),
    "no size": ask(file(), preprocessing=resized(0)),
    "too large": ask(file(), preprocessing=resized(1024)),
    "no such preset": ask(file(), preprocessing=pb.Preprocessing(preset=9)),  # type: ignore[arg-type]
    "no such interpolation": ask(file(), preprocessing=pb.Preprocessing(interpolation=9)),  # type: ignore[arg-type]
    "no such priority": ask(file(), preprocessing=resized(32), priority=9),
    "files of several formats": ask(*map(saved, ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"))),
    "file cut off": ask(pb.Image(encoded=saved("PNG").encoded[:-200]), pixels(), preprocessing=resized(32)),
    "file to be turned": ask(saved("JPEG", exif=TURNED)),
    "file turned": ask(saved("JPEG", exif=TURNED), preprocessing=UPRIGHT),
    "most pixels": ask(file(200, 200), file(201, 200), pixels(), preprocessing=resized(32)),
    "most pixels are a file's": ask(pixels(201, 200), preprocessing=resized(32)),
    "broken file": ask(file(), BROKEN, file(), preprocessing=resized(32)),
    "broken files alone, of no size": ask(BROKEN, BROKEN),
    "broken file of no size": ask(pixels(), BROKEN, pixels(16, 16)),
    "file of no size": ask(file(33, 48), pixels()),
    "tensor of no size": ask(pixels(33, 48), pixels()),
    "empty image": ask(pb.Image(), pixels(), preprocessing=resized(32)),
    "short tensor": ask(pb.Image(pixels=SHORT), pixels()),
    "short tensor, resized": ask(pb.Image(pixels=SHORT), pixels(), preprocessing=resized(32)),
    "floats not finite": ask(pb.Image(pixels=floats(first=np.inf)), pb.Image(pixels=floats())),
    "floats too large": ask(pb.Image(pixels=floats(first=-1001)), pb.Image(pixels=floats(first=1000))),
    "floats of another size": ask(pb.Image(pixels=floats()), pixels(), preprocessing=resized(64)),
    "floats with views": ask(pb.Image(pixels=floats(), views=[pb.View()]), pixels()),
    "model pinned": ask(model="dinov3_vitb16"),
    "fingerprint pinned": ask(fingerprint="cafe"),
    "fingerprint pinned well": ask(fingerprint="f0"),
    "cropped": ask(
        file(),
        pixels(61, 90),
        file(9, 200, pb.View(), crop(0, 3, 9, 40)),
        preprocessing=resized(64, 32, fit=CROP),
    ),
    "cropped, resized before": ask(
        file(), pixels(64, 64), preprocessing=resized(64, fit=pb.Fit(method=2, resize_shorter=80))
    ),
    "padded": ask(
        file(),
        pixels(61, 90),
        file(2, 200),
        preprocessing=resized(64, 32, fit=RED),
    ),
    "views fitted": ask(
        file(70, 90, pb.View(fit=pb.Fit()), pb.View(fit=PAD), pb.View(fit=CROP, size=size(48))),
        file(70, 90),
        preprocessing=resized(32, fit=pb.Fit(method=2, resize_shorter=40)),
    ),
    "view larger than what is resized": ask(
        file(70, 90, pb.View(size=size(48)), pb.View(fit=pb.Fit(method=2, resize_shorter=31))),
        pixels(),
        preprocessing=resized(32, fit=pb.Fit(method=2, resize_shorter=40)),
    ),
    "no such fit": ask(preprocessing=resized(32, fit=pb.Fit(method=9))),  # type: ignore[arg-type]
    "no such fit of a view": ask(file(70, 90, pb.View(fit=pb.Fit(method=9))), pixels()),  # type: ignore[arg-type]
    "fit of no size": ask(preprocessing=pb.Preprocessing(preset=pb.PRESET_NONE, fit=CROP)),
    "view's fit of no size": ask(file(64, 64, pb.View(fit=PAD)), pixels()),
    "stretched pads": ask(preprocessing=resized(32, fit=pb.Fit(pad_color=pb.Color()))),
    "padded after resizing": ask(preprocessing=resized(32, fit=pb.Fit(method=3, resize_shorter=40))),
    "resized to less": ask(preprocessing=resized(32, 64, fit=pb.Fit(method=2, resize_shorter=63))),
    "no color": ask(preprocessing=resized(32, fit=pb.Fit(method=3, pad_color=pb.Color(blue=256)))),
    "no background": ask(preprocessing=resized(32, background=pb.Color(red=2**32 - 1))),
    "floats cropped": ask(pb.Image(pixels=floats()), pixels(), preprocessing=pb.Preprocessing(fit=CROP)),
    "packed floats padded": pb.ExtractRequest(
        pixels=tensor(np.ones((2, 3, 32, 48), np.float32)), preprocessing=pb.Preprocessing(fit=PAD)
    ),
    "over a color": ask(
        *(saved(format, mode="RGBA") for format in ("PNG", "WEBP", "TIFF", "GIF")),
        saved("JPEG"),
        pixels(),
        preprocessing=resized(32, background=pb.Color(red=200, green=9)),
    ),
    "truncated": ask(
        *(pb.Image(encoded=saved(format).encoded[:-400]) for format in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")),
        preprocessing=resized(32, allow_truncated=True),
    ),
    "views": ask(
        file(70, 90, crop(0, 0, 40, 41), crop(3, 4, 50, 60, horizontal_flip=True), pb.View()),
        pixels(64, 64, crop(32, 32, 32, 32, interpolation=pb.INTERPOLATION_LANCZOS)),
        file(),
        preprocessing=resized(32),
    ),
    "views of several sizes": ask(
        file(70, 90, pb.View(), pb.View(size=size(48)), pb.View(size=size(32))),
        file(70, 90, pb.View(size=size(48)), pb.View()),
        preprocessing=resized(32),
    ),
    "views as they are": ask(
        file(70, 90, crop(1, 2, 32, 48), crop(0, 0, 16, 16, size=size(64))),
        pixels(32, 48, pb.View(horizontal_flip=True)),
    ),
    "view of a file of no size": ask(file(33, 48, pb.View(), crop(0, 0, 16, 16)), pixels()),
    "view of a tensor of no size": ask(pixels(33, 48, pb.View(), crop(0, 0, 16, 16)), pixels()),
    "crop of no size": ask(file(70, 90, crop(0, 0, 33, 48)), pixels()),
    "view's size is none": ask(
        file(70, 90, pb.View(size=size(33)), pb.View(size=size(48)), pb.View()), pixels(), preprocessing=resized(32)
    ),
    "view's interpolation is none": ask(
        file(70, 90, pb.View(interpolation=9), pb.View()),  # type: ignore[arg-type]
        pixels(),
        preprocessing=resized(32),
    ),
    "crop beyond a file": ask(file(70, 90, crop(0, 0, 9, 9), crop(60, 0, 11, 9)), pixels(), preprocessing=resized(32)),
    "crop beyond a tensor": ask(pixels(32, 48, crop(0, 40, 9, 9), pb.View()), pixels(), preprocessing=resized(32)),
    "views at fault in several ways": ask(
        pixels(32, 48, pb.View(), crop(0, 40, 9, 9), pb.View(size=size(33)), crop(0, 0, 0, 9)),
        preprocessing=resized(32),
    ),
    "crop of nothing": ask(pixels(32, 48, crop(0, 0, 0, 9), pb.View()), pixels(), preprocessing=resized(32)),
    "crop of nothing as it is": ask(file(32, 48, crop(0, 0, 16, 0), pb.View(size=size(32))), pixels()),
    "views of a broken file": ask(
        pb.Image(encoded=b"broken", views=[pb.View(), pb.View(size=size(48)), crop(0, 0, 9, 9)]),
        preprocessing=resized(32),
    ),
    "views of a broken file as they are": ask(
        pb.Image(encoded=b"broken", views=[pb.View(), pb.View(size=size(48)), crop(0, 0, 32, 32), crop(0, 0, 9, 9)])
    ),
    "views of an empty image": ask(pb.Image(views=[pb.View(), pb.View()]), pixels(), preprocessing=resized(32)),
    "all outputs": wants(cls=True, patches=True, registers=True, dtype=pb.DATA_TYPE_FLOAT32),
    "registers": wants(registers=True, dtype=pb.DATA_TYPE_FLOAT16),
    "layers": layers(LAYER(layer=3, patches=True), LAYER(layer=0, cls=True, registers=True, skip_norm=True)),
    "layer with and without norm": layers(LAYER(layer=0, patches=True), LAYER(layer=0, patches=True, skip_norm=True)),
    "layer twice": layers(LAYER(layer=3, patches=True), LAYER(layer=3, cls=True)),
    "no such layer": layers(LAYER(layer=3, cls=True), LAYER(layer=4, patches=True)),
    "layer of nothing": layers(LAYER(layer=3)),
    "no such dtype": wants(dtype=77),
    "pixels' dtype": wants(dtype=pb.DATA_TYPE_UINT8),
    "int8": wants(cls=True, patches=True, registers=True, dtype=pb.DATA_TYPE_INT8),
    "pooled": wants(
        cls=True, patches=True, layers=[LAYER(layer=0, patches=True)], pooling=POOL(grid_height=3, grid_width=1)
    ),
    "pooled, bilinear": wants(
        patches=True, pooling=POOL(grid_height=3, grid_width=5, method=pb.POOLING_METHOD_BILINEAR)
    ),
    "pooled, cls alone": wants(cls=True, pooling=POOL(grid_height=3, grid_width=5)),
    "pooled to nothing": wants(patches=True, pooling=POOL(grid_height=3)),
    "pooled to too much": wants(patches=True, pooling=POOL(grid_height=1000, grid_width=1000)),
    "pooled somehow": wants(patches=True, pooling=POOL(grid_height=3, grid_width=1, method=9)),  # type: ignore[arg-type]
    "channels first": wants(
        cls=True, patches=True, layers=[LAYER(layer=0, patches=True)], patch_layout=pb.PATCH_LAYOUT_CHANNELS_FIRST
    ),
    "channels first, pooled int8": wants(
        patches=True,
        dtype=pb.DATA_TYPE_INT8,
        pooling=POOL(grid_height=2, grid_width=3),
        patch_layout=pb.PATCH_LAYOUT_CHANNELS_FIRST,
    ),
    "no such layout": wants(patches=True, patch_layout=9),
    "projected": wants(cls=True, patches=True, layers=[LAYER(layer=0, cls=True)], projection="p8"),
    "projected, pooled int8": wants(
        patches=True, dtype=pb.DATA_TYPE_INT8, pooling=POOL(grid_height=1, grid_width=2), projection="p8"
    ),
    "projected layer": layers_projected(LAYER(layer=0, patches=True)),
    "projected layer of other channels": layers_projected(LAYER(layer=0, patches=True), LAYER(layer=1, patches=True)),
    "projection of other channels": wants(patches=True, projection="narrow"),
    "no such projection": wants(patches=True, projection="p9"),
    "fingerprint with a projection pinned to the model": ask(
        outputs=pb.Outputs(patches=True, projection="p8"), fingerprint="f0"
    ),
    "fingerprint of a projection that is not asked for": ask(fingerprint="f0+of-p8"),
    "answer too large": ask(
        *[file()] * 6, preprocessing=resized(448), outputs=pb.Outputs(patches=True, dtype=pb.DATA_TYPE_FLOAT32)
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_alike(servers: tuple[Any, Any], name: str) -> None:
    real, fake = (skeleton(stub, REQUESTS[name]) for stub in servers)
    assert fake == real


def test_models_are_alike(servers: tuple[Any, Any]) -> None:
    real, fake = (stub.GetModel(pb.GetModelRequest()) for stub in servers)
    for model in (real, fake):
        for projection in model.projections:
            assert projection.fingerprint
            projection.fingerprint = ""
    assert fake == real


def test_a_pin_of_model_and_projection(servers: tuple[Any, Any]) -> None:
    for stub in servers:
        told = {one.name: one.fingerprint for one in stub.GetModel(pb.GetModelRequest()).projections}
        outputs = pb.Outputs(patches=True, projection="p8")
        for name, code in (("p8", 0), ("narrow", grpc.StatusCode.FAILED_PRECONDITION.value[0])):
            pinned = ask(outputs=outputs, fingerprint=f"f0+{told[name]}")
            answer = skeleton(stub, pinned)
            assert answer.get("code", 0) == code


def test_alike_in_a_stream(servers: tuple[Any, Any]) -> None:
    good = REQUESTS["packed"]
    messages = [
        pb.ExtractStreamRequest(id=1, request=good),
        pb.ExtractStreamRequest(id=2, request=REQUESTS["no such layer"]),
        pb.ExtractStreamRequest(id=3),
        pb.ExtractStreamRequest(id=4, request=good, timeout_seconds=-1),
    ]
    found = []
    for stub in servers:
        answers = {answer.id: answer for answer in stub.ExtractStream(iter(messages))}
        assert shape_of(answers[1].response)["blocks"]
        found.append([sorted(answers), *[status_of(answers[id].error) for id in (2, 3, 4)]])
    assert found[0] == found[1]


def test_a_message_over_the_limit_is_refused_by_grpc(servers: tuple[Any, Any]) -> None:
    request = ask(pixels(1024, 1024), preprocessing=resized(32))
    real, fake = (skeleton(stub, request) for stub in servers)
    assert fake == real
    assert (fake["code"], fake["fields"], fake["retry"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], [], False)


def skeleton(stub: Any, request: pb.ExtractRequest) -> dict[str, Any]:
    try:
        return shape_of(stub.Extract(request, timeout=LIMIT))
    except grpc.RpcError as caught:
        error: Any = caught
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        status = status_pb2.Status.FromString(details) if details else status_pb2.Status(code=error.code().value[0])
        return status_of(status)


def status_of(status: Any) -> dict[str, Any]:
    fields = []
    retry = False
    for detail in status.details:
        request = BadRequest()
        retry |= detail.Is(RetryInfo.DESCRIPTOR)
        if detail.Unpack(request):
            fields += [violation.field for violation in request.field_violations]
    message = status.message.partition("It would take")[0]  # The real server counts the bytes before it has them.
    if any(field.endswith(".encoded") for field in fields):
        message = ""
    return {"code": status.code, "message": message, "fields": fields, "retry": retry}


def shape_of(answer: pb.ExtractResponse) -> dict[str, Any]:
    return {
        "fingerprint": answer.fingerprint.partition("+")[:2],  # what follows identifies numbers
        "errors": [(error.image_index, status_of(error.status)) for error in answer.errors],
        "blocks": [
            {
                "size": (block.input_size.height, block.input_size.width),
                "images": list(block.image_indices),
                "views": list(block.view_indices),
                "layers": [entry.layer for entry in block.layers],
                "tensors": [tensors_of(holder) for holder in (block, *block.layers)],
            }
            for block in answer.blocks
        ],
    }


def tensors_of(holder: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"grid": (holder.grid_height, holder.grid_width)}
    for kind in ("cls", "patches", "registers"):
        if holder.HasField(kind):
            tensor = getattr(holder, kind)
            step = len(tensor.data) // tensor.shape[0]
            zero = [not any(tensor.data[at : at + step]) for at in range(0, len(tensor.data), step)]
            found[kind] = (tensor.dtype, list(tensor.shape), len(tensor.data), len(tensor.scales), zero)
    return found
