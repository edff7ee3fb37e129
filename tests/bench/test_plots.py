"""Plots of synthetic records: they are reproducible, and skipped with a reason if a record is missing."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.plots import FIGURES, draw
from bench.record import ROOT

RECORDS: dict[str, dict[str, Any]] = {
    "baselines": {
        "dtype": "bfloat16",
        "rows": [
            {"in_flight": n, "round": r, "server": s, "images_per_second": 30.0, "p50_ms": 20.0 * n, "p99_ms": 30.0 * n}
            for n, r, s in product((1, 8), (1, 2), ("ours", "naive", "pytriton"))
        ],
    },
    "service": {
        "rows": [
            {
                "requests": requests,
                "in_flight": in_flight,
                "images_per_second": 40.0,
                "stage_ms": {
                    "decode": 1.0, "queue": 90.0, "copy_in": 0.0, "forward": 8.0, "copy_out": 0.5, "respond": 0.5
                },
            }
            for requests, in_flight in product(("raw", "jpeg, 80 bytes"), (1, 8))
        ]
    },
    "bare": {
        "absent": {"upstream": "no copy of it"},
        "rows": [
            {"model": "vits16", "dtype": dtype, "size": 224, "batch": batch, "ours/eager": 2.0, "ours/compiled": 1.5}
            for dtype, batch in product(("float32", "bfloat16"), (1, 8))
        ],
    },
    "operators": {
        "rows": [
            {"model": "vits16", "size": 224, "dtype": "float32", "ms": {"linear: fc2": 90.0, "RoPE": 9.0, "rare": 1.0}},
            {"model": "vits16", "size": 224, "dtype": "bfloat16", "ms": {"linear: fc2": 50.0, "attention: rest": 50.0}},
        ]
    },
}  # fmt: skip
# Words that are in a figure only if it was drawn from the right record.
WORDS = {
    "baselines-throughput": ["PyTriton", "naive gRPC server", "requests in flight", "images/s"],
    "baselines-latency": ["20", "160", "requests in flight"],
    "service-throughput": ["raw", "jpeg, 80 bytes"],
    "service-stages": ["jpeg, 80 bytes, 8 in flight", "copy out", "80%", "90", "wait in the queue, ms"],
    "bare-ratios": ["vits16, bfloat16", "transformers, compiled", "224 px, 8"],
    "operators": ["linear: fc2", "90%", "attention: rest", "RoPE", "rest"],
}


def record(folder: Path, **records: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in records.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def words(svg: Path) -> set[str]:
    return {"".join(text.itertext()) for text in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")}


def test_every_figure_is_drawn_from_its_record_and_reproducible(tmp_path: Path) -> None:
    results = record(tmp_path / "results", **RECORDS)
    first, second = draw(results, tmp_path / "one"), draw(results, tmp_path / "two")
    assert {path.stem for path in first} == set(FIGURES) == set(WORDS)
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert not re.search(rb"20\d\d-\d\d-\d\d", one.read_bytes()), "a date would make each drawing a change"
        assert set(WORDS[one.stem]) <= words(one)


def test_an_absent_baseline_is_in_no_figure(tmp_path: Path) -> None:
    draw(record(tmp_path / "results", bare=RECORDS["bare"]), tmp_path)
    assert "Meta's own code" not in words(tmp_path / "bare-ratios.svg")
    rows = [row for row in RECORDS["baselines"]["rows"] if row["server"] != "pytriton"]
    draw(record(tmp_path / "results", baselines={"dtype": "float32", "rows": rows}), tmp_path)
    assert "PyTriton" not in words(tmp_path / "baselines-latency.svg") | words(tmp_path / "baselines-throughput.svg")


def test_a_missing_or_outdated_record_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = record(tmp_path / "results", service={"rows": [{"in_flight": 1}]})
    assert draw(results, tmp_path) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FIGURES)
    assert "no plot bare-ratios: there is no bare.json; `python -m bench bare` records it" in lines
    assert (
        "no plot service-throughput: service.json has no 'requests'; `python -m bench service` records it anew" in lines
    )


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_record_has_the_metadata_of_its_run(path: Path) -> None:
    metadata = json.loads(path.read_text())["metadata"]
    assert re.match(r"[0-9a-f]{40}\b", metadata["commit"])
    for key in ("command", "cpu", "date", "versions"):
        assert metadata[key], key
