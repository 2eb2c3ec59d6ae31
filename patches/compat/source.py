"""A tree of vLLM's Python sources, read without importing vLLM."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cascade.patches.record import signature_of

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Found:
    """What a dotted path names.

    Args:
        module: The module that defines the name.
        node: The name's definition; None if the standard library defines the name.
        value: The object itself if the standard library defines the name.
    """

    module: str
    node: ast.AST | None
    value: Any = None

    @property
    def says(self) -> str | None:
        """A function's parameters as `signature_of` writes them, or an assigned value."""
        if self.node is None:
            return signature_of(self.value)
        if isinstance(self.node, Function):
            return f"({', '.join(_parameters(self.node))})"
        value = getattr(self.node, "value", None)
        return None if value is None else ast.unparse(value)


class Source:
    """The sources of one vLLM.

    Args:
        root: The folder `vllm`, or the folder that holds it.

    Raises:
        FileNotFoundError: There is no vLLM.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "vllm" if (root / "vllm" / "__init__.py").exists() else root
        if not (self.root / "v1" / "__init__.py").exists():
            raise FileNotFoundError(f"{root} has no vLLM sources: give the folder that holds vllm/")

    @property
    def version(self) -> str:
        """The version that vLLM's build wrote into the sources, or "of unknown version"."""
        path = self.root / "_version.py"
        text = path.read_text() if path.exists() else ""
        found = re.search(r"^__version__ = .*?['\"](.+?)['\"]", text, re.MULTILINE)
        return found[1] if found else "of unknown version"

    def find(self, path: str) -> Found | None:
        """Find what the dotted `path` names, through imports and base classes; None if nothing."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            name = ".".join(parts[:end])
            module = self._module(name)
            if module is None:
                continue
            found: Found | None = Found(name, module)
            for part in parts[end:]:
                found = found and self._member(found, part)
            return found
        return None

    def elsewhere(self, name: str) -> list[str]:
        """List the modules that define a function or a class `name`, as dotted paths."""
        defines = re.compile(rf"^\s*(?:async )?(?:def|class) {re.escape(name)}\b", re.MULTILINE)
        # `rglob` does not look into a folder that is a link.
        paths = sorted(self.root.rglob("*.py"))
        return [self._dotted(path) for path in paths if defines.search(path.read_text())]

    def _dotted(self, path: Path) -> str:
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(("vllm", *parts)).removesuffix(".__init__")

    def _module(self, name: str) -> ast.Module | None:
        first, *rest = name.split(".")
        folder = self.root.joinpath(*rest)
        for path in (folder / "__init__.py", folder.with_suffix(".py")):
            if first == "vllm" and path.exists():
                return _parsed(path.resolve())
        return None

    def _member(self, scope: Found, name: str) -> Found | None:
        if scope.node is None:
            value = getattr(scope.value, name, None)
            return None if value is None else Found(scope.module, None, value)
        if not isinstance(scope.node, ast.Module | ast.ClassDef):
            return None
        for node in _definitions(scope.node.body, name):
            if isinstance(node, ast.Import | ast.ImportFrom):
                return self._imported(scope.module, node, name)
            return Found(scope.module, node)
        if isinstance(scope.node, ast.Module):
            if self._module(f"{scope.module}.{name}"):
                return self.find(f"{scope.module}.{name}")
            return self._starred(scope.module, scope.node, name)
        for node in ast.walk(scope.node):
            if _sets_attribute(node, name):
                return Found(scope.module, node)
        for base in scope.node.bases:
            above = self._base(scope.module, base)
            found = above and self._member(above, name)
            if found:
                return found
        return None

    def _starred(self, module: str, node: ast.Module, name: str) -> Found | None:
        """What `name` stands for if one of a module's ``from ... import *`` brings it in."""
        for part in node.body:
            if isinstance(part, ast.ImportFrom) and part.names[0].name == "*":
                path = next(path for _, path in imported(part, self._package(module)))
                found = self.find(f"{path.removesuffix('*')}{name}")
                if found:
                    return found
        return None

    def _base(self, module: str, base: ast.expr) -> Found | None:
        if isinstance(base, ast.Subscript):
            base = base.value
        first, *rest = ast.unparse(base).split(".")
        node = self._module(module)
        found = node and self._member(Found(module, node), first)
        for part in rest:
            found = found and self._member(found, part)
        return found or None

    def _imported(self, module: str, node: ast.Import | ast.ImportFrom, name: str) -> Found | None:
        path = next(path for alias, path in imported(node, self._package(module)) if alias == name)
        first = path.partition(".")[0]
        if first == "vllm":
            return self.find(path)
        if first not in sys.stdlib_module_names:
            return None
        if isinstance(node, ast.Import):
            return Found(module, None, importlib.import_module(path))
        owner, _, attribute = path.rpartition(".")
        return Found(module, None, getattr(importlib.import_module(owner), attribute, None))

    def _package(self, module: str) -> str:
        is_package = (self.root.joinpath(*module.split(".")[1:]) / "__init__.py").exists()
        return module if is_package else module.rpartition(".")[0]


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, str]]:
    """List the names that a statement imports.

    Args:
        node: The statement.
        package: Dotted path of the package that relative names start from.

    Returns:
        Pairs of a name, as the statement binds it, and the absolute dotted path behind the name.
    """
    if isinstance(node, ast.Import):
        for alias in node.names:
            path = alias.name if alias.asname else alias.name.partition(".")[0]
            yield alias.asname or path, path
        return
    parts = package.split(".")
    above = parts[: len(parts) + 1 - node.level] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    for alias in node.names:
        yield alias.asname or alias.name, f"{base}.{alias.name}"


def _definitions(body: list[ast.stmt], name: str) -> Iterator[ast.stmt]:
    """Statements in the body of a module or class that bind `name`, in ``if`` and ``try`` too."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            handlers = getattr(node, "handlers", [])
            for part in (node.body, node.orelse, *(handler.body for handler in handlers)):
                yield from _definitions(part, name)
        elif isinstance(node, Function | ast.ClassDef):
            if node.name == name:
                yield node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if any((alias.asname or alias.name) == name for alias in node.names):
                yield node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                yield node


def _sets_attribute(node: ast.AST, name: str) -> bool:
    """Whether `node` gives `self` an attribute or a buffer `name`."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr == name and ast.unparse(node.value) == "self"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_buffer":
        return isinstance(node.args[0], ast.Constant) and node.args[0].value == name
    return False


def _parameters(function: Function) -> list[str]:
    """A function's parameters without annotations; those of a class method without the class."""
    arguments = ast.parse(ast.unparse(function)).body[0].args  # type: ignore[attr-defined]
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    if any(ast.unparse(decorator) == "classmethod" for decorator in function.decorator_list):
        del (arguments.posonlyargs or arguments.args)[0]
    return [ast.unparse(arguments)]
