"""FeatureDataset over what runs have written, alone and in torch's DataLoader."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dinov3_client import FeatureDataset, Unavailable
from dinov3_client.bulk import ExtractionError
from dinov3_client.bulk.rows import ExtractionOptions
from tests.client.bulk.stub import StubClient, broken, contents, run, values


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for index in range(13):
        name = f"sub/{index:02}.jpg" if index % 3 == 1 else f"{index:02}.jpg"
        (folder / name).write_bytes(broken(index) if index in (2, 4) else contents(index))
    return folder


@pytest.fixture
def dataset(source: Path, tmp_path: Path) -> FeatureDataset:
    run(source, tmp_path / "out", ExtractionOptions(shard_rows=4, layers=(3,)))
    return FeatureDataset(tmp_path / "out")


def test_items_by_index_and_id(dataset: FeatureDataset, source: Path) -> None:
    assert len(dataset) == 11
    ids = list(dataset.ids())
    assert ids == sorted(ids)
    assert {"02.jpg", "sub/04.jpg"}.isdisjoint(ids)
    for index, image in enumerate(ids):
        data = (source / image).read_bytes()
        for item in (dataset[index], dataset[image], dataset[index - len(ids)], dataset[np.int64(index)]):
            assert sorted(item) == [
                "cls", "grid", "id", "input_size", "layer3_cls", "layer3_grid", "layer3_patches", "patches",
            ]  # fmt: skip
            assert item["id"] == image
            assert item["grid"].tolist() == [2, 2]
            assert item["input_size"].tolist() == [32, 32]
            assert item["cls"].dtype == np.float16
            assert np.array_equal(item["cls"], values(data, "cls"))
            assert np.array_equal(item["layer3_patches"], values(data, "patches", 3))
        assert dataset.index(image) == index
        assert dataset.id(index) == image
    assert dataset.fingerprint == "f00d"
    assert dataset.header["options"]["shard_rows"] == 4
    assert "11 images" in repr(dataset)
    for wrong in (11, -12):
        with pytest.raises(IndexError, match=f"index {wrong} of 11 images"):
            dataset[wrong]
    with pytest.raises(KeyError, match=r"no features of '02\.jpg'"):
        dataset["02.jpg"]
    assert len(list(dataset)) == 11  # type: ignore[call-overload]  # the old protocol of iteration, by index


def test_items_may_be_written_to_and_raw_ones_may_not(dataset: FeatureDataset) -> None:
    item = dataset[0]
    before = item["cls"].copy()
    item["cls"] += 1
    assert np.array_equal(dataset[0]["cls"], before)
    raw = dataset.raw(0)
    assert np.array_equal(raw["cls"], before)
    assert not raw["cls"].flags.writeable
    assert isinstance(raw["patches"], np.memmap)


def test_bfloat16_comes_as_float32(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", ExtractionOptions(dtype="bfloat16"))
    dataset = FeatureDataset(tmp_path / "out")
    data = (source / "00.jpg").read_bytes()
    assert dataset["00.jpg"]["patches"].dtype == np.float32
    assert np.array_equal(dataset["00.jpg"]["patches"], values(data, "patches", dtype="bfloat16").astype(np.float32))
    assert dataset.raw("00.jpg")["cls"].dtype.name == "bfloat16"


def test_int8_comes_times_its_scales(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", ExtractionOptions(dtype="int8", layers=(3,), shard_rows=4))
    dataset = FeatureDataset(tmp_path / "out")
    for index in range(len(dataset)):
        data = (source / dataset.id(index)).read_bytes()
        item, raw = dataset[index], dataset.raw(index)
        assert sorted(raw) == sorted(
            f"{prefix}{kind}{end}"
            for prefix in ("", "layer3_") for kind in ("cls", "patches") for end in ("", "_scales")
        )  # fmt: skip
        assert not [name for name in item if "scales" in name]
        assert (raw["cls"].dtype, raw["cls_scales"].shape, raw["patches_scales"].shape) == (np.int8, (), (4,))
        for layer, prefix in ((None, ""), (3, "layer3_")):
            for kind in ("cls", "patches"):
                exact = values(data, kind, layer, "float32")
                found = item[prefix + kind]
                assert found.dtype == np.float32
                assert np.abs(found - exact).max() <= np.abs(exact).max() / 127


def test_several_input_sizes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    sizes = [(32, 16 * (1 + index % 3)) for index in range(9)]
    for index, size in enumerate(sizes):
        (source / f"{index}.jpg").write_bytes(contents(index, size=size))
    for dtype in ("float16", "int8"):
        run(source, tmp_path / dtype, ExtractionOptions(preset="none", shard_rows=4, dtype=dtype))  # type: ignore[arg-type]
        dataset = FeatureDataset(tmp_path / dtype)
        for index, (height, width) in enumerate(sizes):
            item = dataset[index]
            assert item["input_size"].tolist() == [height, width]
            assert item["grid"].tolist() == [height // 16, width // 16]
            exact = values((source / f"{index}.jpg").read_bytes(), "patches")
            assert item["patches"].shape == exact.shape
            assert np.allclose(item["patches"], exact, atol=0.02 if dtype == "int8" else 0)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_a_loader_with_workers(dataset: FeatureDataset, source: Path, method: str) -> None:
    dataset[5]  # map_shard before the fork
    loader: Any = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=method)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for batch in loader:
        count = len(batch["id"])
        assert batch["patches"].shape == (count, 4, 6)
        assert batch["input_size"].tolist() == [[32, 32]] * count
        found |= dict(zip(batch["id"], batch["cls"], strict=True))
    assert list(found) == list(dataset.ids())
    for image, cls in found.items():
        assert np.array_equal(cls.numpy(), values((source / image).read_bytes(), "cls"))


def test_a_pickle_holds_no_features(dataset: FeatureDataset) -> None:
    for index in range(len(dataset)):
        dataset[index]
    dataset.index("00.jpg")
    data = pickle.dumps(dataset)
    assert len(data) < 4000
    again = pickle.loads(data)
    assert np.array_equal(again["00.jpg"]["cls"], dataset["00.jpg"]["cls"])
    assert multiprocessing.get_start_method(allow_none=True) in (None, "fork", "forkserver", "spawn")


def test_an_unfinished_extraction_is_no_dataset_by_accident(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExtractionError, match=r"holds no features .* no manifest\.jsonl"):
        FeatureDataset(out)
    with pytest.raises(Unavailable):
        run(source, out, client=StubClient(stop=(5, Unavailable("gone"))), batch_images=3)
    with pytest.raises(ExtractionError) as raised:
        FeatureDataset(out)
    assert "is unfinished: 5 of 13 images have features" in str(raised.value)
    some = FeatureDataset(out, unfinished=True)
    assert len(some) == 5
    assert np.array_equal(some[4]["cls"], values((source / some.id(4)).read_bytes(), "cls"))
    with (out / "manifest.jsonl").open("ab") as file:
        file.write(b'{"id": "torn')
    assert len(FeatureDataset(out, unfinished=True)) == 5
    run(source, out)
    assert len(FeatureDataset(out)) == 11


def test_shards_that_are_missing_or_cut(dataset: FeatureDataset) -> None:
    path = dataset.folder / "features-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ExtractionError, match=f"00001.safetensors has {len(data) - 1:,} bytes, and was written with"):
        FeatureDataset(dataset.folder)
    path.unlink()
    with pytest.raises(ExtractionError, match=r"00001\.safetensors is missing"):
        FeatureDataset(dataset.folder)


def test_a_damaged_manifest(dataset: FeatureDataset) -> None:
    path = dataset.folder / "manifest.jsonl"
    text = path.read_bytes()
    path.write_bytes(text.replace(b'{"id":"00.jpg"', b'{"id":"00.jpg', 1))
    with pytest.raises(ExtractionError, match="is damaged"):
        FeatureDataset(dataset.folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shard":"features-00000.safetensors","bytes"', b'"shard":"../features-00000.safetensors","bytes"'),
        (b'"row":1,', b'"row":-1,'),
        (b'"row":1,', b'"row":9999,'),
        (b'"row":1,', b'"row":"1",'),
        (b'"row":1,', b""),
        (b'"sizes":', b'"seizes":'),
        (b'"sizes":{', b'"sizes":{},"was":{'),
        (b'"grid":[2,2]', b'"grid":2'),
        (b'"id":"00.jpg', b'"id":2,"was":"'),
    ],
)
def test_a_manifest_that_lies(dataset: FeatureDataset, old: bytes, new: bytes) -> None:
    path = dataset.folder / "manifest.jsonl"
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new, 1))
    with pytest.raises(ExtractionError, match="is damaged"):
        FeatureDataset(dataset.folder)


def test_no_image_with_features(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(broken(1))
    run(tmp_path, tmp_path / "out")
    assert len(FeatureDataset(tmp_path / "out")) == 0


def test_npz_files_are_for_numpy(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", ExtractionOptions(format="npz"))
    with pytest.raises(ExtractionError, match=r"holds npz files: numpy\.load can read them"):
        FeatureDataset(tmp_path / "out")


def test_slices(dataset: FeatureDataset) -> None:
    assert [item["id"] for item in dataset[1:3]] == dataset.ids()[1:3] == list(dataset.ids())[1:3]
    assert dataset[:-1][-1]["id"] == dataset.ids()[-2]
    assert len(dataset.ids()) == len(dataset)
    assert repr(dataset.ids()).startswith(f"<{len(dataset)} ids: '")
