"""The oracle stands on its own: it imports nothing that it judges."""

from __future__ import annotations

import ast
from pathlib import Path


def test_imports_nothing_that_it_judges():
    folder = Path(__file__).parents[1] / "reference"
    allowed = {"__future__", "collections", "dataclasses", "functools", "json", "pathlib"}
    allowed |= {"numpy", "reference", "safetensors", "torch", "typing"}
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, file.name
