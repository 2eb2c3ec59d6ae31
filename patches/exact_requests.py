"""Refuses requests that ask to be exact and may outgrow the budget."""

from __future__ import annotations

import functools
from typing import Any

from vllm_cascade.patches.record import Patch


def install() -> None:
    """Wrap the front end's check of a request's parameters."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_cascade.support.exact import check_exact

        request = original(self, *args, **kwargs)
        check_exact(self.vllm_config, request)
        return request

    InputProcessor.process_inputs = process_inputs


PATCH = Patch(
    name="exact_requests",
    target="vllm.v1.engine.input_processor.InputProcessor.process_inputs",
    signature=(
        "(self, request_id, prompt, params, supported_tasks, arrival_time=None, "
        "lora_request=None, tokenization_kwargs=None, trace_headers=None, priority=0, "
        "data_parallel_rank=None, resumable=False, session_id=None, kv_hints=None)"
    ),
    symptom=(
        "A request cannot say that it wants an error, and no answer from a cache that has dropped "
        "some of its tokens"
    ),
    removal="vLLM lets plugins check a request together with its prompt",
    install=install,
)
