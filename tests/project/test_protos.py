"""The committed stubs are what protoc makes of the committed contract, and import at the floor of our ranges."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROTOC_PYTHON = ROOT / ".venv-protoc" / "bin" / "python"
FOLDER = Path("dinov3_serving/v1")
STUBS = ("feature_service_pb2.py", "feature_service_pb2.pyi", "feature_service_pb2_grpc.py")


@pytest.fixture(scope="module", autouse=True)
def protoc() -> None:
    assert PROTOC_PYTHON.exists(), "the protoc environment is missing: run `make test`, or `make protos` once"


def run(*arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(PROTOC_PYTHON), *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    run("-m", "grpc_tools.protoc", "-Iprotos", *outputs, f"protos/{FOLDER}/feature_service.proto")
    for stub in STUBS:
        fresh, committed = ((root / FOLDER / stub).read_text() for root in (tmp_path, ROOT / "protos"))
        assert fresh == committed, f"{stub} is out of date: run `make protos`"


def test_stubs_import_and_work_at_the_floor() -> None:
    """The protoc environment holds the oldest grpcio and protobuf of our ranges."""
    code = """
import sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, "protos")
import google.protobuf, grpc
from dinov3_serving.v1 import feature_service_pb2 as pb, feature_service_pb2_grpc
tensor = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=[1, 2], data=b"ab")
assert pb.Tensor.FromString(tensor.SerializeToString()) == tensor
assert feature_service_pb2_grpc.FeatureServiceStub(grpc.insecure_channel("localhost:1"))
print(google.protobuf.__version__, grpc.__version__)
"""
    protobuf, grpcio = run("-c", code).split()
    assert protobuf.startswith("5.29.")
    assert grpcio == "1.71.2"
    metadata = (ROOT / "pyproject.toml").read_text()
    assert '"grpcio>=1.71.2"' in metadata
    assert '"protobuf>=5.29,<8"' in metadata


def test_the_server_parses_requests_at_the_floor() -> None:
    code = """
import sys
sys.path[:0] = ["server", "protos"]
from dinov3_server.api.wire import parse
from dinov3_serving.v1 import feature_service_pb2 as pb
request = pb.ExtractRequest(images=[pb.Image(encoded=b"x" * 10_000)] * 3)
parsed, resolve_bytes = parse(pb.ExtractRequest, request.SerializeToString(), 3)
print(sum(len(resolve_bytes(image.encoded)) for image in parsed.images))
"""
    assert run("-c", code).strip() == "30000"
