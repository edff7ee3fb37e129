"""Every example has a page that shows its own lines, an environment with pins, and is run by `make integrations`."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from tests.integrations.examples import EXAMPLES, Example
from tests.support.paths import ROOT, tracked

PAGES = ROOT / "docs" / "integrations"
ENVIRONMENTS = ("raw-stubs", "ray", "daft", "datasets", "webdataset", "parquet", "torchrun", "notebook")
OTHER_EXAMPLES = {"demo.py", "distill.py"}  # `make demo`, and docs/training.md


def source(example: Example) -> str:
    text = (ROOT / "examples" / example.file).read_text()
    if example.file.endswith(".ipynb"):
        return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def test_every_example_is_run() -> None:
    files = {name.removeprefix("examples/") for name in tracked() if name.startswith("examples/")}
    programs = {name for name in files if Path(name).suffix in (".py", ".js", ".ipynb")}
    assert programs - OTHER_EXAMPLES == {example.file for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_its_page_shows_lines_of_the_example(example: Example) -> None:
    page = (PAGES / example.page).read_text()
    assert f"`examples/{example.file}`" in page
    sources = "\n".join(source(each) for each in EXAMPLES if each.page == example.page)
    shown = re.findall(r"^```(?:python|js)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert shown
    for block in shown:
        assert block in sources + "\n", block


def test_every_page_is_in_the_menu_and_in_the_overview() -> None:
    menu = re.findall(r"docs/integrations/([\w-]+\.md)", (ROOT / "mkdocs.yml").read_text())
    assert set(menu) == {path.name for path in PAGES.glob("*.md")} == {"index.md", *(each.page for each in EXAMPLES)}
    overview = (PAGES / "index.md").read_text()
    for example in EXAMPLES:
        assert f"({example.page})" in overview
        assert f"`examples/{example.file}`" in overview


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.name)
def test_a_page_names_files_that_exist(page: Path) -> None:
    for name in re.findall(r"(?<![\w./])(?:examples|protos|constraints)/[\w./-]*\w", page.read_text()):
        assert (ROOT / name).exists() or name == "constraints/NAME.txt", name


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_package_of_an_environment_is_pinned(environment: str) -> None:
    lines = (ROOT / "constraints" / f"{environment}.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    if environment != "raw-stubs":  # the others hold this project's client
        dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        names = {re.split(r"[<>=]", each)[0].replace("-", "_") for each in dependencies}
        assert names <= {pin.split("==")[0].replace("-", "_").lower() for pin in pins}
