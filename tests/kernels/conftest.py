"""Kernel tests run on the CUDA device where there is one, else through Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger tiles in the interpreter, where a program costs much and the size of its tiles little.

    Only where prefill's preparation is not itself what is tested.
    """
    if not torch.cuda.is_available() and request.path.stem != "test_scored_prefill":
        from vllm_cascade.kernels.prefill import workspace

        monkeypatch.setattr(workspace, "OWN_TOKENS", 64)
        monkeypatch.setattr(workspace, "PAGE_TOKENS", 64)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
