"""Who may know what: the house's walls, held by reading the imports of every file."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT, tracked

SERVER = ROOT / "server" / "dinov3_server"
CLIENT = ROOT / "client" / "dinov3_client"
# Lower rooms know nothing of higher ones. A room may import from its own and from lower floors.
FLOORS = {
    "errors": 0, "config": 0, "metrics": 0, "log": 0, "storage": 0, "cgroups": 0, "host": 0, "malloc": 0, "signals": 0,
    "models": 1, "images": 1,
    "nn": 2, "engine": 2,
    "families": 3,
    "backbone": 4, "provision": 4,
    "api": 5, "processes": 5,
    "cli": 6,
    "__main__": 7,
}  # fmt: skip


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Full names of the modules that a file imports, also inside functions, but not for type checkers alone."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                    for other in child.orelse:
                        yield from walk(other)
                case ast.Import(names=names):
                    yield from (alias.name for alias in names)
                case ast.ImportFrom(module=str(module), names=names):
                    yield module
                    yield from (f"{module}.{alias.name}" for alias in names)
                case _:
                    yield from walk(child)

    return tuple(walk(ast.parse(path.read_text())))


def room(path: Path) -> str:
    return path.relative_to(SERVER).parts[0].removesuffix(".py")


def knows(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(path))


FILES = sorted(path for path in SERVER.rglob("*.py") if path != SERVER / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SERVER)))
def test_a_room_knows_only_what_it_may(path: Path) -> None:
    here = room(path)
    assert here in FLOORS, f"{here} is a new room: give it a floor"
    for name in imports(path):
        if name.startswith("dinov3_server."):
            other = name.split(".")[1]
            if other == "__version__":
                continue
            # A child's entry point starts frontends; the supervisor only speaks to them.
            if other != here and not (path == SERVER / "processes" / "child_main.py" and other == "api"):
                allowed = FLOORS[other] < FLOORS[here] or FLOORS[here] == 0
                assert allowed, f"{here} imports {name}, which stands above it or beside it"
    assert not knows(path, "dinov3_client")
    for package in ("grpc", "grpc_health", "grpc_status", "grpc_reflection", "dinov3_serving.v1"):
        assert here == "api" or not knows(path, package), f"only api/ may import {package}"
    computes = here in ("nn", "families", "backbone")
    assert computes or not knows(path, "torch"), "only what computes may import torch: nn/, families/, backbone/"


@pytest.mark.parametrize("name", ["scheduler", "pace", "shares", "forecast"])
def test_what_decides_about_load_is_pure(name: str) -> None:
    path = SERVER / "engine" / f"{name}.py"
    for package in ("torch", "asyncio", "threading", "time", "numpy"):
        assert not knows(path, package)


@pytest.mark.parametrize("path", sorted(CLIENT.rglob("*.py")), ids=lambda path: path.name)
def test_the_client_needs_neither_server_nor_torch(path: Path) -> None:
    for package in ("dinov3_server", "prometheus_client"):
        assert not knows(path, package)
    if path.parent != CLIENT / "torch":
        assert not knows(path, "torch"), "only dinov3_client.torch may import torch"
        assert not knows(path, "yaml"), "only a teacher's configuration is read from YAML"


def test_the_client_has_no_import_cycle() -> None:
    """Features.torch() imports dinov3_client.torch when it is called, which is the one exception."""
    modules = {".".join(path.relative_to(CLIENT.parent).with_suffix("").parts): path for path in CLIENT.rglob("*.py")}
    graph = {
        name: {other for other in imports(path) if other in modules and "torch" not in other.split(".")}
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    "module", ["dinov3_server.api.frontend", "dinov3_server.processes.supervisor", "dinov3_server.cli", "dinov3_client"]
)
def test_torch_is_loaded_in_workers_only(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_supervisor_speaks_no_grpc() -> None:
    code = "import sys, dinov3_server.processes.supervisor; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_refers_to_what_is_not_in_the_project() -> None:
    for name in tracked():
        if name.endswith((".py", ".md", ".toml", ".yaml", ".yml", ".proto", "Makefile", "Dockerfile")):
            text = (ROOT / name).read_text()
            assert "../shared" not in text or name == "tests/project/test_imports.py", name
