"""Dependencies point one way: plugin -> backend and manager -> layout -> config."""

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
    f"{package}.{path.stem}".removesuffix(".__init__"): path
    for folder, package in FOLDERS.items()
    for path in sorted((ROOT / folder).glob("*.py"))
}


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
    for module in ("vllm_cascade.layout", "vllm_cascade.kernels", "vllm_cascade.patches.record"):
        assert module in MODULES
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


@pytest.mark.parametrize(
    "module", ["spec", "manager", "metadata", "impl", "backend", "rope", "trace"]
)
def test_the_backend_knows_neither_plugin_nor_patches(module: str) -> None:
    for name in imports_of(f"vllm_cascade.{module}"):
        assert not is_within(name, "vllm_cascade.plugin", "vllm_cascade.patches"), name
