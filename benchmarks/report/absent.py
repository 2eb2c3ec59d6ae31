"""Stand-ins for what vLLM's CPU build lacks, and text models import but do not use."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import unittest.mock
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

# Transforms of images, for modules that define a model's text half beside the whole model.
PACKAGE = "torchvision"


class _Finder:
    """Finds the package and whatever is imported from it, all without content."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return unittest.mock.MagicMock(name=spec.name, __spec__=spec, __name__=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it."""


@contextlib.contextmanager
def stood_in() -> Iterator[None]:
    """Within the block imports of torchvision give a stand-in, and Triton's has an allocator."""
    import transformers
    from transformers.utils import import_utils
    from vllm.triton_utils import triton

    # It remembers that the package is absent, and does not ask for its version.
    import_utils.is_torchvision_available()
    assert transformers
    finder = _Finder()
    with (
        unittest.mock.patch.dict(sys.modules),
        unittest.mock.patch.object(sys, "meta_path", [*sys.meta_path, finder]),
        unittest.mock.patch.object(triton, "set_allocator", lambda _: None, create=True),
    ):
        yield
