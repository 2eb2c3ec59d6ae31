"""vLLM's sleep mode: what CASCADE keeps on a GPU beside weights and pages has to outlast it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm_cascade.support.drafts import is_drafters

# vLLM copies what is allocated under this tag to the host before it sleeps, at every level, and
# back when it wakes. Of weights, level 2 copies nothing but the buffers of the model's modules.
TAG = "runtime"


def kept_asleep(vllm_config: Any) -> AbstractContextManager[Any]:
    """Give a context in which tensors are allocated that are to be as before after a sleep.

    CASCADE's rotary tables and scratch are made while vLLM loads the model, among its weights. The
    tables are in no module, and the merge kernel relies on sums that it has left at zero.

    Args:
        vllm_config: vLLM's complete configuration, of a model or of a drafter.

    Returns:
        The context; it does nothing where vLLM has no memory that sleeps.
    """
    from vllm.device_allocator import get_mem_allocator_instance
    from vllm.platforms import current_platform

    model_config = vllm_config.model_config
    if is_drafters(vllm_config):
        # vLLM makes a drafter's configuration without the option.
        model_config = vllm_config.speculative_config.target_model_config
    if not (current_platform.is_cuda_alike() and model_config.enable_cumem_allocator):
        return nullcontext()
    return get_mem_allocator_instance().use_memory_pool(tag=TAG)
