"""Blocks shared by requests that begin alike, on a GPU, where steps are scheduled ahead.

The cases of `e2e.test_shared_prefix`, with the model runner, scheduler and kernels of a GPU.
"""

from __future__ import annotations

import pytest

from e2e.test_shared_prefix import (
    MODEL,
    llm,
    shared_llm,
    test_a_holder_that_comes_to_the_boundary,
    test_a_request_that_may_come_to_the_boundary_gets_copies,
    test_salts_keep_apart,
    test_the_first_part_of_a_document,
    test_whatever_the_others_do,
)
from e2e.tiny import save_llama

__all__ = [
    "llm",
    "shared_llm",
    "test_a_holder_that_comes_to_the_boundary",
    "test_a_request_that_may_come_to_the_boundary_gets_copies",
    "test_salts_keep_apart",
    "test_the_first_part_of_a_document",
    "test_whatever_the_others_do",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), **MODEL | {"head_dim": 64})
