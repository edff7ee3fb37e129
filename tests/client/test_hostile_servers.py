"""Servers that lie, send bombs or talk to the terminal: the client says what is wrong, in its own errors."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as Detail
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from dinov3_client import Client, Dinov3Error, InvalidRequest, InvalidResponse, Overloaded, ServerError, StatusError
from dinov3_client._errors import from_status
from dinov3_client._features import join
from dinov3_client._images import load
from dinov3_client._model import read_model
from dinov3_client._request import check_options
from dinov3_client._response import read
from dinov3_client._split import split
from dinov3_client._text import printable
from dinov3_client.cli import main
from dinov3_client.testing import MODEL, Failure, FakeServer
from dinov3_client.testing._answer import answer
from dinov3_client.testing._model import message_of
from dinov3_serving.images import Decoding
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.client.adapters import Adapter

PIXELS = np.zeros((32, 32, 3), np.uint8)
ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\nroot: all is well \u202e"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J\r\nroot: all is well \u202e"


class Answering(grpc.GenericRpcHandler):
    """Answers every call, of any method, by `answer(context)`."""

    def __init__(self, answer: Callable[[grpc.ServicerContext], bytes]) -> None:
        self.answer = answer

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        return grpc.unary_unary_rpc_method_handler(lambda _, context: self.answer(context))


@contextlib.contextmanager
def raw_server(answer: Callable[[grpc.ServicerContext], bytes], **arguments: Any) -> Iterator[str]:
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, handlers=[Answering(answer)], **arguments)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def _cleared(*names: str) -> Callable[[pb.GetModelResponse], None]:
    def lie(message: pb.GetModelResponse) -> None:
        for name in names:
            message.ClearField(name)  # type: ignore[arg-type]

    return lie


def _set(**fields: Any) -> Callable[[pb.GetModelResponse], None]:
    def lie(message: pb.GetModelResponse) -> None:
        for name, value in fields.items():
            message.ClearField(name)  # type: ignore[arg-type]
            message.MergeFrom(pb.GetModelResponse(**{name: value}))

    return lie


LIES = {
    "depth is 0": _set(depth=0),
    "layer_dims has 12 numbers, not 4294967295": _set(depth=2**32 - 1),
    "layer_dims has 1 numbers, not 12": _set(layer_dims=[24]),
    r"layer_dims\[1\] is 0": _set(layer_dims=[24, *[0] * 11]),
    "layer_strides has 0 numbers, not 12": _set(layer_strides=[]),
    r"layer_strides\[0\] is 0": _set(layer_strides=[0] * 12),
    "patch_size is 14, and the last layer has 16": _set(patch_size=14),
    "embed_dim is 0, and the last layer has 24": _set(embed_dim=0),
    "frontends is 0": _set(frontends=0),
    "limits.max_message_bytes is 0": _cleared("limits"),
    "mean has 1 numbers, not 3": _set(mean=[0.5]),
    "cannot be normalized": _set(std=[0.2, 0.0, 0.2]),
    "cannot be normalized by the mean .*nan": _set(mean=[0.5, float("nan"), 0.5]),
    "fingerprint is empty": _set(fingerprint=""),
    r"projections\[0\].output_channels is 0": _set(projections=[pb.Projection(name="small", input_channels=24)]),
    "a side of the preset 'hf' is 0": _set(presets=[pb.PresetInfo(preset=pb.PRESET_HF, size=pb.Size(height=224))]),
}


@pytest.mark.parametrize("words", LIES)
def test_an_impossible_model_is_refused(adapter: type[Adapter], words: str) -> None:
    message = message_of(MODEL, 0)
    LIES[words](message)
    with raw_server(lambda _: message.SerializeToString()) as target, adapter(target) as one:
        with pytest.raises(InvalidResponse, match=words):
            one.model()
        with pytest.raises(InvalidResponse, match=words):
            one.extract(PIXELS, preset="none", layers=[-1])


def test_an_answer_that_is_compressed_is_refused(adapter: type[Adapter]) -> None:
    """Of 64 MiB that travel as 64 KB; what refused it first is gRPC, before it unpacks anything."""
    bomb = raw_server(lambda _: bytes(64 << 20), compression=grpc.Compression.Gzip, options=_UNLIMITED)
    with bomb as target, adapter(target) as one:
        with pytest.raises(ServerError, match="the response is compressed, which this client refuses") as caught:
            one.model()
        assert caught.value.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED)  # by grpcio's version


_UNLIMITED = [("grpc.max_send_message_length", -1)]


def test_calls_accept_no_compression(adapter: type[Adapter]) -> None:
    accepted = []

    def note(context: grpc.ServicerContext) -> bytes:
        accepted.append(dict(context.invocation_metadata()).get("grpc-accept-encoding", "identity"))
        return message_of(MODEL, 0).SerializeToString()

    with raw_server(note) as target, adapter(target) as one:
        one.model()
    assert accepted == ["identity"]


def _detail(kind: Any, value: bytes) -> Detail:
    detail = Detail()
    detail.Pack(kind())
    detail.value = value
    return detail


@pytest.mark.parametrize(
    "detail", [_detail(BadRequest, b"\xff"), _detail(RetryInfo, b"\xff"), Detail(type_url="x", value=b"\xff")]
)
def test_malformed_details_are_ignored(adapter: type[Adapter], detail: Detail) -> None:
    status = Status(code=3, message="no", details=[detail])
    for trailer in (status.SerializeToString(), b"\xff\xff"):

        def refuse(context: grpc.ServicerContext, trailer: bytes = trailer) -> bytes:
            context.set_trailing_metadata((("grpc-status-details-bin", trailer),))
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")

        with raw_server(refuse) as target, adapter(target) as one, pytest.raises(InvalidRequest) as caught:
            one.model()
        assert (caught.value.message, caught.value.violations) == ("no", ())


def test_a_negative_retry_delay_is_ignored() -> None:
    detail = Detail()
    info = RetryInfo()
    info.retry_delay.FromSeconds(-5)
    detail.Pack(info)
    assert from_status(14, "later", [detail]).retry_after is None
    info.retry_delay.FromSeconds(0)
    detail.Pack(info)
    error = from_status(8, "later", [detail])
    assert isinstance(error, Overloaded)
    assert error.retry_after == 0


def test_printable() -> None:
    assert printable("ein schönes Bild, 猫.jpg") == "ein schönes Bild, 猫.jpg"
    assert printable(ESCAPES) == ESCAPED
    assert printable("\udcff\x9b") == r"\udcff\x9b"  # a byte of a name that is no text; the one-byte CSI


def test_texts_of_a_server_do_not_reach_the_terminal(
    server: FakeServer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    told = message_of(MODEL, 0)
    told.model = told.weights = told.server_version = told.parity_check.reason = told.fingerprint = ESCAPES
    told.devices[:] = [ESCAPES]
    told.projections.add(name=ESCAPES, input_channels=24, output_channels=1, fingerprint=ESCAPES)
    model = read_model(told.SerializeToString())
    assert (model.name, model.devices, model.fingerprint, model.projections[0].name) == (
        ESCAPED,
        (ESCAPED,),
        ESCAPED,
        ESCAPED,
    )
    with raw_server(lambda _: told.SerializeToString()) as target:
        assert main(["info", "--target", target]) == 0
    failure = Failure(grpc.StatusCode.INVALID_ARGUMENT, ESCAPES, field=ESCAPES)
    server.model_script = [failure]
    assert main(["info", "--target", server.target]) == 1
    server.model_script = [Failure(grpc.StatusCode.UNAVAILABLE, ESCAPES, retry_after=0)]
    with Client(server.target) as client:
        client.model()  # the first attempt is logged
        server.script = [failure]
        with pytest.raises(StatusError) as caught:
            client.extract(PIXELS)
    assert [*caught.value.violations[0]] == [ESCAPED, ESCAPED]
    out, err = capfd.readouterr()
    [record] = [record for record in caplog.records if record.name == "dinov3_client"]
    for text in (out, err, str(caught.value), record.getMessage()):
        assert ESCAPED in text
        assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_is_an_answer_or_an_error_of_ours(seed: int) -> None:
    """Honest messages with bytes changed, taken out and put in."""
    rand = random.Random(seed)
    wanted = check_options(("cls", "patches", "registers"), preset="none", dtype="int8", layers=[0, -1], pooling=(2, 2))
    [query] = split(list(load([PIXELS, PIXELS], Decoding())), wanted, MODEL)
    honest = answer(query.message, MODEL, {}, {}).SerializeToString()

    def features(data: bytes) -> None:
        found = join([query], [read(data, query)], "return")
        assert found.cls.shape == (2, 24)
        str(found)

    features(honest)
    model = message_of(MODEL, 0).SerializeToString()
    read_model(model)
    outcomes = set()
    for _ in range(150):
        for parse, message in ((features, honest), (read_model, model)):
            try:
                parse(_changed(message, rand))
                outcomes.add("taken")
            except Dinov3Error:
                outcomes.add("refused")
    assert outcomes == {"taken", "refused"}


def _changed(data: bytes, rand: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rand.randint(1, 4)):
        place = rand.randrange(len(changed))
        match rand.randrange(4):
            case 0:
                changed[place] = rand.randrange(256)
            case 1:
                del changed[place : place + rand.randint(1, 8)]
            case 2:
                changed[place:place] = rand.randbytes(rand.randint(1, 8))
            case _:
                changed[place:place] = changed[rand.randrange(len(changed)) :][:64]
    return bytes(changed)


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("5f0c-17", "5f0c-17"),
        ("job-7/epoch_3:1", "job-7/epoch_3:1"),
        ("two words", None),
        ("x" * 129, None),
        ("", None),
        (None, None),
    ],
)
def test_an_error_ends_with_the_id_of_the_request_if_the_server_sent_a_harmless_one(
    adapter: type[Adapter], sent: str | None, shown: str | None
) -> None:
    def fail(context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata(() if sent is None else (("x-request-id", sent),))
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such layer")
        raise AssertionError

    with raw_server(fail) as target, adapter(target) as client, pytest.raises(InvalidRequest) as caught:
        client.model()
    assert (caught.value.request_id, caught.value.message) == (shown, "no such layer")
    assert str(caught.value) == "no such layer" + ("" if shown is None else f" (request id {shown})")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
