"""Shards of several machines, and their merge: the same files as those of one run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinov3_client import FeatureDataset, Unavailable
from dinov3_client.bulk import ExtractionError
from dinov3_client.bulk.merging import merge
from dinov3_client.bulk.rows import ExtractionOptions
from dinov3_client.cli import main
from dinov3_client.testing import FakeServer
from tests.client.bulk.stub import ProgressListener, StubClient, contents, failed, manifest, run, tree

FORMATS = {
    "safetensors": ExtractionOptions(shard_rows=4, layers=(3,)),
    "one shard": ExtractionOptions(outputs=("cls",)),
    "bfloat16": ExtractionOptions(shard_rows=2, dtype="bfloat16"),
    "int8": ExtractionOptions(shard_rows=5, dtype="int8", outputs=("cls", "patches", "registers")),
    "mixed": ExtractionOptions(shard_rows=3, preset="none"),
    "npz": ExtractionOptions(format="npz", layers=(2,)),
}


def write_shards(source: Path, folder: Path, options: ExtractionOptions, count: int) -> list[Path]:
    parts = [folder / f"part-{number}" for number in range(1, count + 1)]
    for number, part in enumerate(parts, 1):
        run(source, part, options, shard=(number, count))
    return parts


@pytest.mark.parametrize("count", [1, 3, 5, 14])
@pytest.mark.parametrize("form", FORMATS)
def test_a_merge_has_the_files_of_one_run(source: Path, tmp_path: Path, form: str, count: int) -> None:
    options = FORMATS[form]
    if options.mixed:
        for index in (2, 3, 8):
            (source / f"{index:02}.jpg").write_bytes(contents(index, size=(32, 16)))
    run(source, tmp_path / "whole", options)
    parts = write_shards(source, tmp_path, options, count)
    progress = ProgressListener()
    totals = merge(parts[::-1], tmp_path / "merged", progress)
    assert (totals.images, totals.rows, totals.failed) == (12, 9, 3)
    assert (progress.begun, progress.advanced) == ((0, 12), 12)
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")


def test_shards_are_even_and_have_the_indices_of_the_source(source: Path, tmp_path: Path) -> None:
    parts = write_shards(source, tmp_path, FORMATS["safetensors"], 5)
    indices = []
    for number, part in enumerate(parts, 1):
        header, *lines = manifest(part)
        assert header["source"]["shard"] == f"{number}/5"
        rows = [line["index"] for line in lines if "id" in line]
        failures = failed(part) if (part / "failed.jsonl").exists() else []
        indices.append(sorted(rows + [line["index"] for line in failures]))
    assert indices == [[0, 1], [2, 3], [4, 5, 6], [7, 8], [9, 10, 11]]
    assert list(FeatureDataset(parts[1]).ids()) == ["02.jpg", "03.jpg"]


def test_a_shard_resumes_and_is_no_other_shard(source: Path, tmp_path: Path) -> None:
    options = FORMATS["one shard"]
    with pytest.raises(Unavailable):
        run(source, tmp_path / "part", options, client=StubClient(stop=(3, Unavailable("gone"))), shard=(2, 2))
    with pytest.raises(ExtractionError, match="is unfinished: 0 of 6 images"):
        FeatureDataset(tmp_path / "part")
    with pytest.raises(ExtractionError, match=r'source\.shard is "2/2" there and "1/2" now\. To'):
        run(source, tmp_path / "part", options, shard=(1, 2))
    with pytest.raises(ExtractionError, match=r'source\.shard is "2/2" there and null now'):
        run(source, tmp_path / "part", options)
    progress = ProgressListener()
    run(source, tmp_path / "part", options, progress=progress, shard=(2, 2))
    assert progress.begun is not None
    assert progress.begun[0] > 0
    assert sum(progress.begun[:1]) + progress.advanced == 6
    run(source, tmp_path / "other", options, shard=(2, 2))
    assert tree(tmp_path / "part") == tree(tmp_path / "other")


def test_a_merge_that_was_stopped_resumes(source: Path, tmp_path: Path) -> None:
    options = FORMATS["safetensors"]
    parts = write_shards(source, tmp_path, options, 3)
    run(source, tmp_path / "whole", options)
    hidden = parts[2] / "features-00000.safetensors"
    hidden.rename(tmp_path / "hidden")
    with pytest.raises(ExtractionError, match=r"features-00000\.safetensors is missing"):
        merge(parts, tmp_path / "merged", ProgressListener())
    (tmp_path / "hidden").rename(hidden)
    progress = ProgressListener()
    merge(parts, tmp_path / "merged", progress)
    assert progress.begun == (5, 12)
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")
    merge(parts, tmp_path / "merged", progress)
    assert progress.begun == (12, 12)


def refused(parts: Sequence[Path], out: Path) -> str:
    with pytest.raises(ExtractionError) as raised:
        merge(parts, out, ProgressListener())
    assert not (out / "manifest.jsonl").exists()
    return str(raised.value)


def test_what_does_not_belong_together_is_refused_by_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out = FORMATS["one shard"], tmp_path / "merged"
    one, two, three, four = write_shards(source, tmp_path, options, 4)
    assert refused([four, one], out) == "shards 2/4, 3/4 missing: give the folders of all 4"
    assert refused([four, one, two], out) == "shard 3/4 missing: give the folders of all 4"
    shutil.copytree(two, tmp_path / "copy")
    assert refused([one, two, three, tmp_path / "copy", four], out) == (
        f"{two} and {tmp_path}/copy are both shard 2/4: give each once"
    )
    run(source, tmp_path / "whole", options)
    assert refused([one, tmp_path / "whole"], out) == (
        f"{tmp_path}/whole is no shard: its extraction had no --shard I/N"
    )
    other = tmp_path / "other"
    changes: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
        'dtype is "float16" and "float32"': ({"dtype": "float32"}, (2, 4)),
        "N of --shard I/N is 4 and 5": ({}, (2, 5)),
    }
    for words, (change, shard) in changes.items():
        run(source, other, replace(options, **change), shard=shard)
        assert refused([one, other, three, four], out) == (
            f"{one} and {other} are no shards of one extraction: {words}"
        )
        shutil.rmtree(other)
    with pytest.raises(Unavailable):
        run(source, other, options, client=StubClient(stop=(1, Unavailable("gone"))), shard=(3, 4))
    assert "other, shard 3/4, is unfinished: run its" in refused([one, two, other, four], out)
    shutil.rmtree(other)
    (source / "99.jpg").write_bytes(contents(99))
    run(source, other, options, shard=(2, 4))
    assert "source.images is 12 and 13; source.sha256 is" in refused([one, other], out)
    shutil.rmtree(other)
    (source / "99.jpg").unlink()
    from tests.client.bulk import stub

    monkeypatch.setattr(stub, "MODEL", replace(stub.MODEL, fingerprint="beef"))
    run(source, other, options, client=StubClient("beef"), shard=(2, 4))
    assert refused([one, other], out).endswith('one extraction: fingerprint is "f00d" and "beef"')
    assert "holds no features" in refused([one, tmp_path], out)


def test_a_damaged_shard_is_named(source: Path, tmp_path: Path) -> None:
    parts = write_shards(source, tmp_path, FORMATS["one shard"], 2)
    text = (parts[1] / "manifest.jsonl").read_text()
    (parts[1] / "manifest.jsonl").write_text(text.replace('"row":1,', ""))
    with pytest.raises(ExtractionError, match=r"part-2 is damaged \(KeyError\('row'\)\)"):
        merge(parts, tmp_path / "merged", ProgressListener())
    (parts[1] / "manifest.jsonl").write_text(text)
    (parts[1] / "failed.jsonl").unlink()
    with pytest.raises(ExtractionError, match="no result of the image of index 6"):
        merge(parts, tmp_path / "merged", ProgressListener())


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.client.bulk.test_command import pattern, png, summary

    for path in source.iterdir():
        path.write_bytes(png(pattern(int(path.stem), 16, 16)) if path.stem != "03" else b"no picture")
    flags = ("--preset", "none", "--outputs", "cls", "--shard-rows", "3")
    with FakeServer() as server:
        command = ["extract", str(source), "--target", server.target, *flags]
        assert main([*command, "--out", str(tmp_path / "whole")]) == 3
        codes = [main([*command, "--out", str(tmp_path / f"{n}"), "--shard", f"{n}/3"]) for n in (1, 2, 3)]
        assert codes == [3, 0, 0]
        for shard in ("0/4", "5/4", "1", "/", "a/b", "1/0"):
            with pytest.raises(SystemExit) as exited:
                main([*command, "--out", str(tmp_path / "x"), "--shard", shard])
            assert exited.value.code == 2
            assert f"'{shard}' is not I/N with I from 1 to N" in capsys.readouterr().err
    parts = [str(tmp_path / f"{n}") for n in (1, 2, 3)]
    capsys.readouterr()
    assert main(["merge", *parts[:2], "--out", str(tmp_path / "merged")]) == 2
    assert capsys.readouterr().err == "dinov3-client: shard 3/3 missing: give the folders of all 3\n"
    assert main(["merge", *parts, "--out", str(tmp_path / "merged")]) == 3
    assert summary(capsys.readouterr().out) == ("11 of 12", str(tmp_path / "merged"), "12")
    assert main(["merge", *parts, "--out", str(tmp_path / "merged"), "--allow-failed", "1"]) == 0
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")
    assert main(["merge", *parts, "--out", parts[0]]) == 2
    assert manifest(tmp_path / "merged")[0]["source"]["images"] == 12
