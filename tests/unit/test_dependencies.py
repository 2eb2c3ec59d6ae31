"""Dependencies point one way: from the commands down to structure and kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = ("rules", "refusal", "config", "layout", "accounting")
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
# Rooms from the ground up, each with its modules: a room imports those below it.
ROOMS = {
    "structure": "rules refusal config layout accounting",
    "kernels": "kernels",
    "support": "validation hybrid selection unsupported rotation",
    "kv_cache": "spec manager continuation",
    "attention": "backend impl rope trace cpu_layer metadata gpu_layer gpu_metadata",
    "plugin": "plugin metrics patches",
    "commands": "plan arguments cli evaluation inspection",
}
FLOORS = {name: floor for floor, names in enumerate(ROOMS.values()) for name in names.split()}


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
    for module in ("layout", "kernels", "patches.record", "evaluation.facts", "inspection"):
        assert f"vllm_cascade.{module}" in MODULES
    assert {name.split(".")[1] for name in MODULES if "." in name} == set(FLOORS)
    assert "torch" in {name.partition(".")[0] for name in imports_of("vllm_cascade.kernels.pages")}


@pytest.mark.parametrize("module", PURE)
def test_layout_and_config_import_no_framework(module: str) -> None:
    siblings = [f"vllm_cascade.{name}" for name in PURE]
    allowed = {*sys.stdlib_module_names, "numpy"}
    for name in imports_of(f"vllm_cascade.{module}"):
        assert name.partition(".")[0] in allowed or is_within(name, *siblings), name


def test_layout_and_config_load_without_torch_and_vllm() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, vllm=None); "  # an import of these fails
        "import vllm_cascade.config, vllm_cascade.layout"
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
    floor = FLOORS[module.split(".")[1]]
    for name in imports_of(module):
        package, _, rest = name.partition(".")
        if package == "vllm_cascade":
            # What the package itself has (its version) is on no floor.
            assert FLOORS.get(rest.partition(".")[0], 0) <= floor, name


def test_kernels_are_imported_by_the_layers_alone() -> None:
    """And by the patch that copies pages."""
    above = {
        module.split(".")[1]
        for module in MODULES
        if not is_within(module, "vllm_cascade.kernels")
        and any(is_within(name, "vllm_cascade.kernels") for name in imports_of(module))
    }
    assert above <= {*ROOMS["attention"].split(), "patches"}
