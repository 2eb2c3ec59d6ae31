"""What all end-to-end tests share: engines in the test's own process start and end in a second."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def models_are_inspected_here() -> Iterator[None]:
    """vLLM asks a new process what each new architecture can do, which imports vLLM for that.

    Engines in processes of their own still do.
    """
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda ask: ask())
        yield


@pytest.fixture(scope="session", autouse=True)
def imports_are_not_searched_for_garbage() -> Iterator[None]:
    """vLLM collects garbage nine times an engine; what it imports makes each last half a second.

    An engine's own objects are collected all the same.
    """
    from vllm import LLM  # noqa: F401
    from vllm.model_executor.models import llama  # noqa: F401
    from vllm.v1.worker import cpu_worker  # noqa: F401

    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def kernels_are_replaced_once() -> Iterator[None]:
    """For each engine vLLM looks through all modules for Triton's kernels, and replaces them."""
    from vllm.platforms import current_platform

    platform, name = type(current_platform), "register_triton_kernel_overrides"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, name, staticmethod(functools.cache(getattr(platform, name))))
        yield


@pytest.fixture(scope="session", autouse=True)
def ranks_are_counted_as_they_are() -> Iterator[None]:
    """vLLM compiles what counts a token's rank, in each process that is asked for probabilities."""
    from vllm.v1.sample import sampler

    with pytest.MonkeyPatch.context() as patch:
        count = sampler.batched_count_greater_than.__wrapped__
        patch.setattr(sampler, "batched_count_greater_than", count)
        yield
