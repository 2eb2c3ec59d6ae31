"""Kernel tests run on the CUDA device where there is one, else through Triton's interpreter."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Files of the kernels whose tiles are larger in all others.
PREFILL = ("test_scored_prefill", "test_prepared_prefill")

if not torch.cuda.is_available():
    # Read when triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def language_is_replaced_once() -> Iterator[None]:
    """The interpreter replaces all of Triton's language for each function that a kernel calls.

    A launch has replaced it for the kernel's module and those like it, until the launch ends. What
    is replaced for a module of Triton's own, which knows the language by another name, stays.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    function_type, replaced = interpreter.InterpretedFunction, set[str]()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        module = function.fn.__module__
        if module.startswith("triton.") and module not in replaced:
            replaced.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function_type, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger tiles in the interpreter, where a program costs much and the size of its tiles little.

    Only where prefill's preparation and scores are not themselves what is tested.
    """
    if not torch.cuda.is_available() and request.path.stem not in PREFILL:
        from vllm_cascade.kernels.prefill import scores, workspace

        large = scores.ScoreConfig(128, scores.MAX_COLUMNS, 4, 1, key_in_registers=False)
        monkeypatch.setattr(scores, "launch_config", lambda *_: large)
        monkeypatch.setattr(workspace, "OWN_TOKENS", 64)
        monkeypatch.setattr(workspace, "PAGE_TOKENS", 64)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
