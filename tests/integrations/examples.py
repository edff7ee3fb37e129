"""The examples of `examples/` that `make integrations` runs, with what each needs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.environment import python_of, run
from dinov3_client import Client
from tests.support.paths import ROOT

PROTO = "protos/dinov3_serving/v1/feature_service.proto"
NODE_MISSING = "needs node and npm: Debian's packages nodejs and npm, or `pip install nodeenv && nodeenv DIR`"


class Skipped(Exception):
    """An example cannot run on this machine, for the given reason."""


class Failed(Exception):
    """An example ran and is wrong, for the given reason."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of examples, and a folder for what they write."""

    target: str
    photos: Sequence[Path]
    shards: str
    out: Path

    @property
    def folder(self) -> str:
        return str(self.photos[0].parent)


Command = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Example:
    """A file of examples/, its page of docs/integrations/, and how it is run.

    `command` makes the environment and returns what to run; `check` looks at its standard output.
    """

    name: str
    file: str
    page: str
    command: Callable[[Inputs], Command]
    check: Callable[[Inputs, str], None] = lambda inputs, printed: None


def python(environment: str, file: str, *arguments: Callable[[Inputs], str]) -> Callable[[Inputs], Command]:
    """Return the command of an example that runs in `.venv-ENVIRONMENT`, which also holds this project's client."""

    def command(inputs: Inputs) -> Command:
        return [python_of(environment, "-e", "."), file, *(argument(inputs) for argument in arguments)]

    return command


def photos(inputs: Inputs) -> str:
    return inputs.folder


def shards(inputs: Inputs) -> str:
    return inputs.shards


def out(inputs: Inputs) -> str:
    return str(inputs.out)


def node(inputs: Inputs) -> Command:
    folder = ROOT / "examples" / "node"
    if not (shutil.which("node") and (npm := shutil.which("npm"))):
        raise Skipped(NODE_MISSING)
    locked, installed = folder / "package-lock.json", folder / "node_modules" / ".made-from.json"
    if not installed.is_file() or installed.read_text() != locked.read_text():
        run(npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=folder)
        installed.write_text(locked.read_text())
    return ["node", "examples/node/extract.js", *inputs.photos]


def raw_stubs(inputs: Inputs) -> Command:
    interpreter = python_of("raw-stubs")
    stubs = inputs.out / "stubs"
    stubs.mkdir()
    run(
        interpreter, "-m", "grpc_tools.protoc", "-Iprotos", f"--python_out={stubs}", f"--grpc_python_out={stubs}", PROTO
    )
    return ["env", f"PYTHONPATH={stubs}", interpreter, "examples/raw_stubs.py", *inputs.photos]


def ray(file: str, *arguments: Callable[[Inputs], str]) -> Callable[[Inputs], Command]:
    """Return the command of an example for Ray, whose processes find the functions of examples/ by import."""
    command = python("ray", file, *arguments)
    return lambda inputs: ["env", f"PYTHONPATH={ROOT / 'examples'}", *command(inputs)]


def torchrun(inputs: Inputs) -> Command:
    interpreter = python_of("torchrun", "-e", ".[torch]")
    flags = ("--standalone", "--nproc-per-node=2")
    return [interpreter, "-m", "torch.distributed.run", *flags, "examples/torchrun_ddp.py", inputs.folder]


def notebook(inputs: Inputs) -> Command:
    interpreter = python_of("notebook", "-e", ".")
    # The kernel is the environment's own, not one that the user's Jupyter has registered.
    run(interpreter, "-m", "ipykernel", "install", "--sys-prefix", "--name", "python3")
    flags = ("--to", "notebook", "--execute", "--output-dir", inputs.out)
    return ["env", f"PHOTOS={inputs.folder}", interpreter, "-m", "nbconvert", *flags, "examples/features.ipynb"]


def check_lines(inputs: Inputs, printed: str) -> None:
    """Compare JSON lines of `photo`, `cls` and `patch_mean` with what the client gives."""
    lines = [json.loads(line) for line in printed.splitlines()]
    if [line["photo"] for line in lines] != [str(photo) for photo in inputs.photos]:
        raise Failed(f"wrong photos: {[line['photo'] for line in lines]}")
    with Client(inputs.target) as client:
        expected = client.extract(inputs.photos, dtype="float32")
    assert expected.cls is not None
    assert expected.patches is not None
    for name, values in (("cls", expected.cls), ("patch_mean", expected.patches.mean(1))):
        given = np.array([line[name] for line in lines])
        # The rounding of bfloat16, the least precise of the dtypes.
        if not np.allclose(given, values, rtol=2**-7, atol=2**-7 * np.abs(values).max()):
            raise Failed(f"{name} differs from the client's by up to {np.abs(given - values).max()}")


EXAMPLES = (
    Example("node", "node/extract.js", "node.md", node, check_lines),
    Example("raw-stubs", "raw_stubs.py", "raw-stubs.md", raw_stubs, check_lines),
    Example("ray-data", "ray_data.py", "ray.md", ray("examples/ray_data.py", photos)),
    Example("ray-bulk", "ray_bulk.py", "ray.md", ray("examples/ray_bulk.py", photos, out)),
    Example("ray-lost-node", "ray_bulk.py", "ray.md", ray("tests/integrations/ray_lost_node.py", photos, out)),
    Example("daft", "daft_udf.py", "daft.md", python("daft", "examples/daft_udf.py", photos)),
    Example("datasets", "hf_datasets.py", "datasets.md", python("datasets", "examples/hf_datasets.py", photos, out)),
    Example(
        "webdataset",
        "webdataset_shards.py",
        "webdataset.md",
        python("webdataset", "examples/webdataset_shards.py", shards, out),
    ),
    Example("parquet", "parquet_tables.py", "parquet.md", python("parquet", "examples/parquet_tables.py", photos, out)),
    Example("torchrun", "torchrun_ddp.py", "torchrun.md", torchrun),
    Example("notebook", "features.ipynb", "notebook.md", notebook),
)
