"""Keeps the token of a boundary from being computed together with drafts, or with others.

Where a GPU's model runner V2 rejects late drafts (`late_drafts`), rows keep them: vLLM's graphs of
whole decode steps are for rows of as many tokens each.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_cascade.patches.late_drafts import has_late_drafts
from vllm_cascade.patches.record import Patch


def install() -> None:
    """Have a scheduler with drafts ask CASCADE's managers how many tokens a request may compute."""
    from vllm.v1.core.sched.scheduler import Scheduler

    init, split = Scheduler.__init__, Scheduler._mamba_block_aligned_split

    @functools.wraps(init)
    def init_with_drafts(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # Has vLLM ask how to cut what a request computes. Beside Mamba layers there are no drafts.
        self.need_mamba_block_aligned_split |= bool(self.num_spec_tokens and _managers(self))
        # vLLM finds out anew each time which model runner it has.
        self.cascade_has_late_drafts = has_late_drafts(self.vllm_config)

    @functools.wraps(split)
    def split_before_boundaries(
        self: Any,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        managers = _managers(self)
        if not managers:
            found = (num_new_local_computed_tokens, num_external_computed_tokens)
            return split(self, request, num_new_tokens, *found)
        if num_new_tokens > 1 + self.num_spec_tokens:
            # A chunk of a prompt, without drafts. Workers cut it at boundaries.
            return num_new_tokens
        most = request.num_computed_tokens + num_new_local_computed_tokens
        most += num_external_computed_tokens
        num_known = request.num_tokens + request.num_output_placeholders - most
        if num_known <= 1 and self.cascade_has_late_drafts:
            # All others are drafts: those that are late will be rejected.
            return num_new_tokens
        # Drafts of steps under way count as computed until they are rejected. At least one token
        # of these steps is no draft.
        least = most - max(0, request.num_output_placeholders - 1)
        limits = [manager.most_together(least, most) for manager in managers]
        return min(num_new_tokens, *limits)

    Scheduler.__init__ = init_with_drafts  # type: ignore[method-assign]
    Scheduler._mamba_block_aligned_split = split_before_boundaries


def _managers(scheduler: Any) -> list[Any]:
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return [manager for manager in managers if hasattr(manager, "most_together")]


PATCH = Patch(
    name="draft_boundaries",
    target="vllm.v1.core.sched.scheduler.Scheduler._mamba_block_aligned_split",
    signature=(
        "(self, request, num_new_tokens, num_new_local_computed_tokens=0, "
        "num_external_computed_tokens=0)"
    ),
    symptom=(
        "With speculative decoding a boundary would merge what a draft wrote that is rejected "
        "afterwards, and drafts behind it would be computed before it has run"
    ),
    removal="vLLM asks the KV cache manager how many drafts of a request a step may have",
    install=install,
)
