"""Dependencies point one way: from the commands down to structure and kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"vllm_cascade": "vllm_cascade", "kernels": "vllm_cascade.kernels"} | {
    "patches": "vllm_cascade.patches"
}
MODULES = {
    ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for folder, package in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# Rooms from the ground up: a room imports those below it. The plugin's own modules and the command
# line are rooms of one module.
ROOMS = (
    ("structure",),
    ("kernels",),
    ("support",),
    ("kv_cache",),
    ("attention",),
    ("patches", "plugin", "metrics", "trace"),
    ("commands",),
    ("evaluation",),
    ("inspection",),
    ("cli",),
)
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def imports_of(module: str) -> Iterator[str]:
    """Dotted names of all that a module imports, in functions too, relative names made absolute.

    ``from a import b`` counts as ``a.b``, for b may be a module.
    """
    path = MODULES[module]
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join((above if node.level else []) + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_all_modules_are_looked_at() -> None:
    for module in ("structure.layout", "kernels", "patches.record", "evaluation.facts", "plugin"):
        assert f"vllm_cascade.{module}" in MODULES
    assert {name.split(".")[1] for name in MODULES if "." in name} == set(FLOORS)
    assert "torch" in {name.partition(".")[0] for name in imports_of("vllm_cascade.kernels.pages")}


@pytest.mark.parametrize("module", [m for m in MODULES if is_within(m, "vllm_cascade.structure")])
def test_structure_imports_no_framework(module: str) -> None:
    allowed = {*sys.stdlib_module_names, "numpy"}
    for name in imports_of(module):
        assert name.partition(".")[0] in allowed or is_within(name, "vllm_cascade.structure"), name


def test_structure_loads_without_torch_and_vllm() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, vllm=None); "  # an import of these fails
        "import vllm_cascade.structure.layout, vllm_cascade.structure.resolve"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("module", [m for m in MODULES if is_within(m, "vllm_cascade.kernels")])
def test_kernels_import_torch_and_triton_only(module: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for name in imports_of(module):
        assert name.partition(".")[0] in allowed or is_within(name, "vllm_cascade.kernels"), name


@pytest.mark.parametrize("module", MODULES)
def test_product_code_imports_no_test(module: str) -> None:
    for name in imports_of(module):
        assert not is_within(name, "tests", "reference", "e2e", "unit"), name


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_rooms_import_what_is_below_them(module: str) -> None:
    room = module.split(".")[1]
    for name in imports_of(module):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        # What the package itself has (its version) is in no room.
        if package == "vllm_cascade" and other in FLOORS and other != room:
            assert FLOORS[other] < FLOORS[room] or {room, other} <= set(ROOMS[FLOORS[room]]), name


def test_no_module_imports_itself_through_others() -> None:
    """Imports within functions and for types count too."""
    graph = {
        module: {
            other
            for name in imports_of(module)
            for other in (name, name.rpartition(".")[0])
            if other in MODULES and other != module
        }
        # Of the package itself others take the version.
        for module in MODULES
        if "." in module
    }
    TopologicalSorter(graph).prepare()  # raises where there is a circle


def test_kernels_are_imported_by_the_layers_alone() -> None:
    """And by the patch that copies pages."""
    above = {
        module.split(".")[1]
        for module in MODULES
        if not is_within(module, "vllm_cascade.kernels")
        and any(is_within(name, "vllm_cascade.kernels") for name in imports_of(module))
    }
    assert above == {"attention", "patches"}
