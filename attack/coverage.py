"""Coverage-guided fuzzing (atheris, libFuzzer): `make fuzz-coverage`.

Two targets, each in its own process: `request` reads an ExtractRequest from its bytes to the plan of its computation;
`file` predicts the cost of decoding a file and, if that is small, decodes it. An input is a finding if it raises an
error other than those for clients, or is read differently than protobuf reads it: it is written into a folder, and the
exit code is 1. Findings are kept as cases of the tests.

Nothing else needs atheris. `make fuzz-coverage` installs it into a separate folder, and puts that on the path.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attack import messages
from attack.images import sound_files
from dinov3_serving.v1 import feature_service_pb2 as pb

SECONDS = 60
SEEDS = 400
_LONGEST = 20_000
Target = Callable[[bytes], None]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m attack coverage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"for each target ({SECONDS})")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer (1)")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="folder for findings")
    parser.add_argument("--target", choices=TARGETS, help="only this one, in this process")
    given = parser.parse_args(arguments)
    if given.target:
        _fuzz(given.target, given.seconds, given.seed, given.out)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    flags = ("--seconds", str(given.seconds), "--seed", str(given.seed), "--out", str(given.out))
    codes = []
    for name in TARGETS:
        print(f"{name}: {given.seconds} seconds", flush=True)
        codes.append(subprocess.run([sys.executable, "-m", "attack", "coverage", "--target", name, *flags]).returncode)
    return 1 if any(codes) else 0


def _fuzz(name: str, seconds: int, seed: int, out: Path) -> None:
    """Fuzz one target. It does not return: libFuzzer ends the process."""
    import atheris

    build, corpus = TARGETS[name]
    with atheris.instrument_imports(include=["dinov3_server.api", "dinov3_server.images", "dinov3_serving"]):
        target = build()
    with tempfile.TemporaryDirectory() as folder:
        for index, data in enumerate(corpus()):
            Path(folder, str(index)).write_bytes(data)
        flags = (f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={out}/{name}-", "-timeout=20")
        atheris.Setup([sys.argv[0], folder, f"-max_len={_LONGEST}", "-print_final_stats=1", *flags], target)
        atheris.Fuzz()


def request_target() -> Target:
    from bench.instant import InstantRunner
    from dinov3_server.api import wire
    from dinov3_server.api.convert import read_request
    from dinov3_server.config.settings import Settings
    from dinov3_server.errors import InvalidInput, ModelMismatch

    wire.SHORT_BYTES = 0  # every message is walked
    model, settings = InstantRunner("vits16", "random:0", "cpu").info, Settings()

    def read_data(data: bytes) -> None:
        plain = _parsed(data)
        try:
            incoming = wire.parse(pb.ExtractRequest, data, settings.max_images_per_request)
        except wire.TooManyElements:
            return
        except InvalidInput:
            assert plain is None, "refused what protobuf reads"
            return
        assert _restored(incoming.message, incoming.resolve_bytes) == plain, "read differently than protobuf reads it"
        with suppress(InvalidInput, ModelMismatch):
            read_request(incoming.message, incoming.resolve_bytes, model, settings)

    return read_data


def file_target() -> Target:
    from dinov3_server.errors import InvalidInput
    from dinov3_server.images.cost import cost_of
    from dinov3_server.images.decode import File

    def decode_file(data: bytes) -> None:
        with suppress(InvalidInput):
            cost = cost_of(File(data, 1_000_000))
            assert cost.nbytes >= 0
            if cost.plain:
                picture = File(data, 1_000_000, True).decode()
                assert {picture.width, picture.height} == {cost.width, cost.height}, "another size than was predicted"

    return decode_file


def _requests() -> Iterator[bytes]:
    """Return the smaller requests of `make fuzz`."""
    calls = (messages.call(0, number, bombs=0.0) for number in range(SEEDS))
    return (call.messages[0] for call in calls if call.method == messages.EXTRACT and len(call.messages[0]) < _LONGEST)


TARGETS: dict[str, tuple[Callable[[], Target], Callable[[], Any]]] = {
    "request": (request_target, _requests),
    "file": (file_target, sound_files),
}


def _parsed(data: bytes) -> pb.ExtractRequest | None:
    from google.protobuf.message import DecodeError

    try:
        return pb.ExtractRequest.FromString(data)
    except DecodeError:
        return None


def _restored(request: pb.ExtractRequest, content: Callable[[bytes], bytes | memoryview]) -> pb.ExtractRequest:
    """Return the request with the contents of its `bytes` fields."""
    whole = pb.ExtractRequest()
    whole.CopyFrom(request)
    for image in whole.images:
        if image.HasField("encoded"):
            image.encoded = bytes(content(image.encoded))
    for tensor in [whole.pixels] * whole.HasField("pixels") + [
        image.pixels for image in whole.images if image.HasField("pixels")
    ]:
        tensor.data, tensor.scales = bytes(content(tensor.data)), bytes(content(tensor.scales))
    return whole
