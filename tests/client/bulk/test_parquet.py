"""Parquet shards, as pyarrow reads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov3_client import FeatureDataset, Unavailable
from dinov3_client.bulk import ExtractionError
from dinov3_client.bulk.merging import merge
from dinov3_client.bulk.rows import ExtractionOptions
from dinov3_client.cli import main
from dinov3_client.testing import FakeServer
from tests.client.bulk.stub import ProgressListener, StubClient, contents, manifest, run, tree, values


def parquet() -> Any:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    return pyarrow.parquet


def mixed(source: Path) -> None:
    for index in (2, 3, 8):
        (source / f"{index:02}.jpg").write_bytes(contents(index, size=(32, 16)))


def test_fixed_size_lists_and_metadata(source: Path, tmp_path: Path) -> None:
    pq = parquet()
    options = ExtractionOptions(format="parquet", shard_rows=5, layers=(3,), outputs=("cls", "patches", "registers"))
    run(source, tmp_path / "out", options)
    table = pq.read_table(tmp_path / "out" / "features-00000.parquet")
    types = {field.name: str(field.type).replace("item", "element") for field in table.schema}
    assert types["cls"] == "fixed_size_list<element: halffloat>[6]"
    assert types["patches"] == "fixed_size_list<element: fixed_size_list<element: halffloat>[6]>[4]"
    assert types["registers"] == "fixed_size_list<element: fixed_size_list<element: halffloat>[6]>[2]"
    assert types["layer3_grid"] == types["input_size"] == "fixed_size_list<element: int64>[2]"
    assert table["id"].to_pylist() == ["01.jpg", "02.jpg", "03.jpg", "04.jpg", "05.jpg"]
    assert table["index"].to_pylist() == [1, 2, 3, 4, 5]
    for place, name in enumerate(table["id"].to_pylist()):
        data = (source / name).read_bytes()
        assert np.array_equal(np.array(table["layer3_patches"][place].as_py(), np.float16), values(data, "patches", 3))
    metadata = table.schema.metadata
    assert {key: metadata[key] for key in (b"model", b"weights", b"fingerprint")} == {
        b"model": b"dinov3_vits16", b"weights": b"dinov3_vits16.pth", b"fingerprint": b"f00d",
    }  # fmt: skip
    header, *lines = manifest(tmp_path / "out")
    assert json.loads(metadata[b"options"]) == header["options"]
    rows = [line for line in lines if "id" in line]
    assert [(row["shard"], row["row"]) for row in rows] == [
        (f"features-{place // 5:05}.parquet", place % 5) for place in range(9)
    ]
    with pytest.raises(ExtractionError, match="parquet files: pyarrow, polars and DuckDB can read them"):
        FeatureDataset(tmp_path / "out")


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "float"), ("float32", "float"), ("int8", "int8")])
def test_dtypes(source: Path, tmp_path: Path, dtype: Any, stored: str) -> None:
    pq = parquet()
    run(source, tmp_path / "out", ExtractionOptions(format="parquet", dtype=dtype, outputs=("cls", "patches")))
    table = pq.read_table(tmp_path / "out" / "features-00000.parquet")
    assert str(table.schema.field("cls").type.value_type) == stored
    data = (source / table["id"][0].as_py()).read_bytes()
    found = np.array(table["patches"][0].as_py(), np.float32)
    if dtype == "int8":
        scales = np.array(table["patches_scales"][0].as_py(), np.float32)
        assert np.abs(found * scales[:, None] - values(data, "patches", dtype="float32")).max() <= scales.max()
        assert table["cls_scales"][0].as_py() > 0
    else:
        assert np.array_equal(found, values(data, "patches", dtype=dtype).astype(np.float32))


def test_several_sizes_have_lists_of_any_length(source: Path, tmp_path: Path) -> None:
    pq = parquet()
    mixed(source)
    run(source, tmp_path / "out", ExtractionOptions(format="parquet", preset="none", shard_rows=3))
    schemas = [pq.read_schema(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert schemas == [schemas[0]] * 3
    table = pq.read_table(tmp_path / "out" / "features-00000.parquet")
    assert [len(patches) for patches in table["patches"].to_pylist()] == [4, 2, 2]
    assert table["grid"].to_pylist() == [[2, 2], [2, 1], [2, 1]]


@pytest.mark.parametrize(
    "options",
    [
        ExtractionOptions(format="parquet", shard_rows=4, layers=(3,)),
        ExtractionOptions(format="parquet", shard_rows=4, dtype="bfloat16"),
        ExtractionOptions(format="parquet", dtype="int8", outputs=("cls", "registers")),
        ExtractionOptions(format="parquet", preset="none", dtype="int8", shard_rows=2),
    ],
)
def test_stopped_or_merged_the_files_are_the_same(source: Path, tmp_path: Path, options: ExtractionOptions) -> None:
    parquet()
    if options.mixed:
        mixed(source)
    run(source, tmp_path / "whole", options)
    with pytest.raises(Unavailable):
        run(source, tmp_path / "out", options, client=StubClient(stop=(6, Unavailable("gone"))), batch_images=2)
    run(source, tmp_path / "out", options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    parts = [tmp_path / f"{number}" for number in (1, 2, 3)]
    for number, part in enumerate(parts, 1):
        run(source, part, options, shard=(number, 3))
    merge(parts, tmp_path / "merged", ProgressListener())
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")


def test_ids_that_are_no_text(tmp_path: Path) -> None:
    pq = parquet()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "caf\udce9.jpg").write_bytes(contents(1))
    run(tmp_path / "source", tmp_path / "out", ExtractionOptions(format="parquet"))
    assert pq.read_table(tmp_path / "out" / "features-00000.parquet")["id"].to_pylist() == ["caf\\udce9.jpg"]


def test_without_pyarrow_the_extra_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with FakeServer() as server:
        command = ["extract", str(source), "--target", server.target, "--format", "parquet"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        assert not server.requests
    assert "pip install 'dinov3-serving[parquet]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
