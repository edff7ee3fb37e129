"""Errors as clients see them: status, field, retry delay and message."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

import dinov3_server
from dinov3_server.errors import DeadlineExceeded, InternalError, InvalidInput, Overloaded, ServingError, Unavailable
from dinov3_server.images.decode import File
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import AS_IS, MODEL, encoded, failure_of, failure_of_status, picture, png, serving, tensor
from tests.support.paths import ROOT

PHOTO = encoded(picture(16, 16))
PACKED = tensor(np.zeros((2, 16, 16, 3), np.uint8))
Case = tuple[Callable[[], pb.ExtractRequest], str, str]


def outputs(**fields: object) -> pb.ExtractRequest:
    return pb.ExtractRequest(images=[PHOTO], outputs=pb.Outputs(**fields))  # type: ignore[arg-type]


def preprocessing(**fields: object) -> pb.ExtractRequest:
    return pb.ExtractRequest(images=[PHOTO], preprocessing=pb.Preprocessing(**fields))  # type: ignore[arg-type]


def packed(shape: list[int], nbytes: int, dtype: int = pb.DATA_TYPE_UINT8) -> pb.ExtractRequest:
    return pb.ExtractRequest(pixels=pb.Tensor(dtype=dtype, shape=shape, data=bytes(nbytes)))  # type: ignore[arg-type]


WHOLE_REQUEST: dict[str, Case] = {
    "no images": (pb.ExtractRequest, "images", "neither images nor pixels is set"),
    "images and pixels": (lambda: pb.ExtractRequest(images=[PHOTO], pixels=PACKED), "images", "both images and pixels"),
    "too many images": (lambda: pb.ExtractRequest(images=[PHOTO] * 9), "images", "9 images in one request; .* 1 to 8"),
    "too many packed": (lambda: packed([9, 2, 2, 3], 108), "pixels.shape", "9 images in one request; .* 1 to 8"),
    "no packed": (lambda: packed([0, 16, 16, 3], 0), "pixels.shape", "0 images in one request"),
    "priority": (lambda: pb.ExtractRequest(images=[PHOTO], priority=7), "priority", "7; .*INTERACTIVE, PRIORITY_BULK"),
    "preset": (lambda: preprocessing(preset=9), "preprocessing.preset", "9; .*DINOV3, PRESET_HF, PRESET_NONE"),
    "interpolation": (lambda: preprocessing(interpolation=99), "preprocessing.interpolation", "99; .*_BICUBIC"),
    "size": (lambda: preprocessing(size=pb.Size(height=32, width=518)), "preprocessing.size", "518.*512 or 528"),
    "half a size": (lambda: preprocessing(size=pb.Size(height=32)), "preprocessing.size", "width 0"),
    "tokens": (
        lambda: preprocessing(size=pb.Size(height=1600, width=1600)),
        "preprocessing.size",
        "1600x1600 is 10005 tokens .*allowed are 2000 .*--max-batch-tokens",
    ),
    "layer": (lambda: outputs(layers=[pb.LayerOutputs(layer=6, cls=True)]), "outputs.layers[0].layer", "layers 0 to 5"),
    "empty layer": (lambda: outputs(layers=[pb.LayerOutputs(layer=1)]), "outputs.layers[0]", "layer 1 has no outputs"),
    "layer twice": (
        lambda: outputs(layers=[pb.LayerOutputs(layer=1, cls=True), pb.LayerOutputs(layer=1, patches=True)]),
        "outputs.layers[1]",
        r"is in outputs.layers\[0\] already",
    ),
    "uint8 features": (lambda: outputs(dtype=pb.DATA_TYPE_UINT8), "outputs.dtype", "UINT8; .*FLOAT32.*BFLOAT16"),
    "unknown dtype": (lambda: outputs(dtype=77), "outputs.dtype", "77; allowed"),
    "pixels dtype": (lambda: packed([1, 16, 16, 3], 768, 0), "pixels.dtype", "DATA_TYPE_UNSPECIFIED; allowed"),
    "pixels half": (lambda: packed([1, 16, 16, 3], 1536, 3), "pixels.dtype", "cannot be DATA_TYPE_FLOAT16"),
    "pixels unknown": (lambda: packed([1, 16, 16, 3], 768, 55), "pixels.dtype", "cannot be 55"),
    "rank": (lambda: packed([16, 16, 3], 768), "pixels.shape", r"\[16, 16, 3\]; allowed .*\[N, H, W, 3\]"),
    "channels": (lambda: packed([1, 3, 16, 16], 768), "pixels.shape", r"\[1, 3, 16, 16\]; allowed"),
    "negative": (lambda: packed([1, -16, -16, 3], 768), "pixels.shape", r"\[1, -16, -16, 3\]"),
    "huge": (lambda: packed([1, 2**62, 2**62, 3], 768), "pixels.data", "are 63802943797675961899382738893456539648 by"),
    "bytes": (lambda: packed([1, 16, 16, 3], 767), "pixels.data", "are 768 bytes; 767 were sent"),
    "float layout": (lambda: packed([1, 16, 16, 3], 3072, 2), "pixels.shape", r"FLOAT32 as \[N, 3, H, W\]"),
    "float size": (lambda: packed([1, 3, 16, 17], 3264, 2), "pixels.shape", "16x17"),
    "float resized": (
        lambda: pb.ExtractRequest(
            pixels=tensor(np.zeros((1, 3, 32, 32), np.float32)),
            preprocessing=pb.Preprocessing(size=pb.Size(height=16, width=16)),
        ),
        "pixels.shape",
        "float pixels are never resized: these are 32x32, preprocessing.size is 16x16",
    ),
    "packed size": (
        lambda: pb.ExtractRequest(pixels=tensor(np.zeros((1, 20, 16, 3), np.uint8)), preprocessing=AS_IS),
        "pixels.shape",
        "20x16",
    ),
}


@pytest.mark.parametrize("name", WHOLE_REQUEST)
async def test_errors_of_a_whole_request(name: str) -> None:
    make, field, message = WHOLE_REQUEST[name]
    async with serving(max_images_per_request=8, max_batch_tokens=2000) as rig:
        error = await rig.error(make())
        assert error.code == grpc.StatusCode.INVALID_ARGUMENT
        assert error.field == field
        assert error.retry_seconds is None
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(error.message)
        assert rig.count("dinov3_requests_total", "Extract", "INVALID_ARGUMENT") == 1
        assert rig.count("dinov3_images_total", "invalid") <= 8
        # And nothing else is disturbed.
        await rig.stub.Extract(pb.ExtractRequest(images=[PHOTO]))


BAD_IMAGES: dict[str, tuple[pb.Image, str, str]] = {
    "nothing": (pb.Image(), "images[1]", "set encoded .* or pixels"),
    "empty": (pb.Image(encoded=b""), "images[1].encoded", r"empty \(0 bytes\)"),
    "no image": (pb.Image(encoded=b"P6 5 5 255.."), "images[1].encoded", "looks like PPM.*allowed are JPEG"),
    "truncated": (pb.Image(encoded=png(picture(64, 64))[:-900]), "images[1].encoded", "cannot be decoded"),
    "large": (encoded(picture(80, 80)), "images[1].encoded", "80x80 .* = 6400 pixels, allowed are 5000"),
    "no tensor": (pb.Image(pixels=pb.Tensor()), "images[1].pixels.dtype", "DATA_TYPE_UNSPECIFIED; allowed"),
    "packed": (pb.Image(pixels=PACKED), "images[1].pixels.shape", r"\[2, 16, 16, 3\]; allowed .*\[H, W, 3\]"),
    "float size": (pb.Image(pixels=tensor(np.zeros((3, 15, 16), np.float32))), "images[1].pixels.shape", "15x16"),
    "tokens": (
        pb.Image(pixels=tensor(np.zeros((3, 16, 16 * 300), np.float32))),
        "images[1].pixels.shape",
        "305 tokens .*allowed are 300",
    ),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
async def test_errors_of_one_image(name: str) -> None:
    image, field, message = BAD_IMAGES[name]
    async with serving(max_image_pixels=5000, max_batch_tokens=300) as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=[PHOTO, image, PHOTO]))
        [error] = answer.errors
        assert error.image_index == 1
        failure = failure_of_status(error.status)
        assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
        assert failure.field == field
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(failure.message)
        cls = answer.blocks[0].cls
        rows = np.frombuffer(cls.data, np.uint8).reshape(cls.shape[0], -1).any(axis=1)
        assert rows[[0, -1]].all()


async def test_model_and_fingerprint_must_match_the_server() -> None:
    async with serving() as rig:
        good = pb.ExtractRequest(images=[PHOTO], model=MODEL.name, fingerprint=MODEL.fingerprint)
        await rig.stub.Extract(good)
        for pin in ({"model": "dinov3_vitb16"}, {"fingerprint": "beef"}):
            error = await rig.error(pb.ExtractRequest(images=[PHOTO], **pin))  # type: ignore[arg-type]
            assert error.code == grpc.StatusCode.FAILED_PRECONDITION
            assert error.field is None
            for value in (*pin.values(), getattr(MODEL, {"model": "name"}.get(*pin, *pin))):
                assert repr(value) in error.message


async def test_a_long_error_message_is_cut_to_fit_into_trailers() -> None:
    async with serving() as rig:
        error = await rig.error(pb.ExtractRequest(images=[PHOTO], model="\N{SNOWMAN}" * 340))
        assert error.code == grpc.StatusCode.FAILED_PRECONDITION
        assert error.message.startswith("this server serves the model 'dinov3_test16'")
        assert error.message.endswith("\N{SNOWMAN}…")
        assert len(error.message.encode()) <= 1000


@pytest.mark.parametrize(
    ("error", "code", "retry"),
    [
        (Overloaded("full", reason="queue", retry_after=0.25), "RESOURCE_EXHAUSTED", 0.25),
        (Overloaded("full", reason="arena", retry_after=1.5), "RESOURCE_EXHAUSTED", 1.5),
        (Unavailable("no worker", reason="no_worker", retry_after=2.0), "UNAVAILABLE", 2.0),
        (InvalidInput("never fits", field="images"), "INVALID_ARGUMENT", None),
    ],
)
async def test_errors_when_the_engine_refuses_a_request(error: Exception, code: str, retry: float | None) -> None:
    async with serving() as rig:
        rig.engine.refuse = error  # type: ignore[assignment]
        failure = await rig.error(pb.ExtractRequest(images=[PHOTO, PHOTO]))
        assert (failure.code.name, failure.message, failure.retry_seconds) == (code, str(error), retry)
        assert rig.count("dinov3_requests_total", "Extract", code) == 1
        assert rig.count("dinov3_images_total", "refused" if retry else "invalid") == 2
        if retry:
            assert rig.count("dinov3_refused_requests_total", error.reason) == 1  # type: ignore[attr-defined]


async def test_an_overloaded_server_refuses_requests_before_it_reads_them() -> None:
    async with serving() as rig:
        rig.engine.early_refusal = Overloaded("too late", reason="deadline", retry_after=0.25)
        failure = await rig.error(pb.ExtractRequest(images=[pb.Image(encoded=b"no image")] * 3))
        assert (failure.code.name, failure.retry_seconds) == ("RESOURCE_EXHAUSTED", 0.25)
        assert rig.count("dinov3_refused_images_total", "deadline") == 3
        assert rig.count("dinov3_refusal_seconds") == 1


async def test_a_late_request_is_not_counted_in_refusal_seconds() -> None:
    async with serving() as rig:
        rig.engine.fail = Overloaded("too late", reason="late", retry_after=0.25)
        await rig.error(pb.ExtractRequest(images=[PHOTO]))
        assert rig.count("dinov3_refused_images_total", "late") == 1
        assert rig.count("dinov3_refusal_seconds") == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeadlineExceeded("the deadline passed in the queue"), "DEADLINE_EXCEEDED"),
        (Unavailable("the worker is lost", reason="no_worker"), "UNAVAILABLE"),
        (InternalError("the device failed"), "INTERNAL"),
    ],
)
async def test_errors_when_the_engine_fails(error: Exception, code: str) -> None:
    async with serving() as rig:
        rig.engine.fail = error
        failure = await rig.error(pb.ExtractRequest(images=[PHOTO]))
        assert (failure.code.name, failure.message) == (code, str(error))
        assert not rig.engine.reservations


async def test_one_block_that_fails_cancels_the_others() -> None:
    images = [encoded(picture(16, 16)), encoded(picture(32, 16)), encoded(picture(16, 32))]
    async with serving() as rig:
        rig.engine.hold = True
        call = asyncio.create_task(rig.error(pb.ExtractRequest(images=images, preprocessing=AS_IS)))
        runs = [await rig.engine.runs.get() for _ in range(3)]
        runs[1].go.set_exception(Overloaded("lost its place", reason="queue"))
        assert (await call).code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert rig.engine.cancelled_runs == 2
        assert not rig.engine.reservations


async def test_a_bug_is_an_internal_error_with_an_id_and_without_details(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as rig:
        rig.engine.fail = KeyError("/secret/path")
        with caplog.at_level(logging.ERROR):
            failure = await rig.error(pb.ExtractRequest(images=[PHOTO]))
        assert failure.code == grpc.StatusCode.INTERNAL
        assert "secret" not in failure.message
        [record] = [record for record in caplog.records if record.name.startswith("dinov3_server")]
        assert record.getMessage().split()[-1] in failure.message
        assert record.exc_info is not None
        assert "secret" in repr(record.exc_info[1])
        assert rig.count("dinov3_requests_total", "Extract", "INTERNAL") == 1


async def test_a_bug_in_decoding_fails_one_image_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: File) -> None:
        raise ZeroDivisionError

    # pytest keeps log records, and with the traceback in them views of the arena.
    logged: list[str] = []
    monkeypatch.setattr(
        "dinov3_server.api.status.logger.error",
        lambda text, error_id, exc_info: logged.append(f"{error_id} {exc_info!r}"),
    )
    monkeypatch.setattr(File, "decode", broken)
    async with serving() as rig:
        images = [PHOTO, pb.Image(pixels=tensor(picture(16, 16)))]
        answer = await rig.stub.Extract(pb.ExtractRequest(images=images))
        [error] = answer.errors
        failure = failure_of_status(error.status)
        assert failure.code == grpc.StatusCode.INTERNAL
        assert error.image_index == 0
        [line] = logged
        error_id, what = line.split()
        assert error_id in failure.message
        assert what == "ZeroDivisionError()"


async def test_calls_fail_with_unavailable_while_the_server_starts() -> None:
    async with serving() as rig:
        rig.engine.model = None
        for call in (rig.stub.Extract(pb.ExtractRequest(images=[PHOTO])), rig.stub.GetModel(pb.GetModelRequest())):
            error = await failure_of(call)
            assert error.code == grpc.StatusCode.UNAVAILABLE
            assert "starting" in error.message
            assert error.retry_seconds == 1.0
        assert rig.count("dinov3_refused_requests_total", "starting") == 2


async def test_bytes_that_are_not_a_message_are_invalid() -> None:
    async with serving() as rig:
        for method in ("Extract", "GetModel"):
            call = rig.channel.unary_unary(f"/dinov3_serving.v1.FeatureService/{method}")
            error = await failure_of(call(b"\xff\xff no protobuf"))
            assert error.code == grpc.StatusCode.INVALID_ARGUMENT
            assert f"14 bytes received are not a dinov3_serving.v1.{method}Request message" in error.message


async def test_a_message_over_the_limit_is_refused_by_grpc_without_a_retry() -> None:
    async with serving(max_message_bytes=2**20) as rig:
        error = await rig.error(pb.ExtractRequest(images=[pb.Image(encoded=bytes(2**20))]))
        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_seconds is None


async def test_an_answer_over_the_limit_is_refused_before_any_work() -> None:
    wanted = pb.Outputs(cls=True, patches=True, dtype=pb.DATA_TYPE_FLOAT32)
    image = tensor(np.zeros((43, 16, 16, 3), np.uint8))
    async with serving(max_message_bytes=2**20) as rig:
        request = pb.ExtractRequest(pixels=image, outputs=wanted)
        error = await rig.error(request)
        assert error.code == grpc.StatusCode.INVALID_ARGUMENT
        assert error.field == "outputs"
        for part in ("43 image(s) of 256x256 at 24672 bytes (cls 96, patches 24576)", "1048576", "--max-message-bytes"):
            assert part in error.message
        assert not rig.engine.done_runs
        # One image fewer fits, to within the bound of the frames.
        request.pixels.CopyFrom(tensor(np.zeros((42, 16, 16, 3), np.uint8)))
        answer = await rig.stub.Extract(request)
        assert answer.ByteSize() > 42 * 24672


async def test_errors_of_many_images_can_exceed_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such an answer is refused after the computation only, and still with a message of the server."""

    def verbose(file: File) -> None:
        raise InvalidInput("x" * 5000)

    monkeypatch.setattr(File, "decode", verbose)
    wanted = pb.Outputs(patches=True, dtype=pb.DATA_TYPE_FLOAT32)
    async with serving(max_message_bytes=2**20) as rig:
        error = await rig.error(pb.ExtractRequest(images=[PHOTO] * 42, outputs=wanted))
        assert error.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "errors of 42 images" in error.message


def test_the_documentation_has_every_status_and_every_reason() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    for kind in ServingError.__subclasses__():
        assert f"| `{kind.status}`" in text
    source = "".join(path.read_text() for path in Path(dinov3_server.__file__).parent.rglob("*.py"))
    reasons = set(re.findall(r'reason="(\w+)"', source))
    assert {"arena", "deadline", "late", "starting", "draining"} <= reasons
    reasons |= {"queue", "share", "bulk"}
    assert [reason for reason in reasons if f"`{reason}`" not in text] == []
