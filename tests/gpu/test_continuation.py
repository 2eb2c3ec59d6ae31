"""A request that goes on in the blocks of a finished one or in copies, and with vLLM's graphs.

The cases of `e2e.test_continuation`, with the model runner, scheduler and kernels of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from e2e.test_continuation import (
    MODEL,
    check_stopped,
    forget,
    start,
    test_a_request_that_was_aborted_in_its_prefill,
    test_many_go_on_from_a_prompt,
    test_prompts_that_begin_alike,
    test_several_go_on_from_an_answer,
    test_turns_of_a_chat,
)
from e2e.tiny import save_llama

__all__ = [
    "forget",
    "test_a_request_that_was_aborted_in_its_prefill",
    "test_many_go_on_from_a_prompt",
    "test_prompts_that_begin_alike",
    "test_several_go_on_from_an_answer",
    "test_turns_of_a_chat",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), head_dim=64, **MODEL)


@pytest.fixture(scope="module", params=["distinct", "blend"])
def llm(model: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    with start(model, request.param, enable_prefix_caching=True) as llm:
        yield llm


def test_an_answer_that_was_stopped(model: str) -> None:
    check_stopped(model, asynchronous=True, enforce_eager=False)
