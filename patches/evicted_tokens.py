"""Says in each answer how many of the request's tokens are no longer held."""

from __future__ import annotations

import functools
from typing import Any

from vllm_cascade.patches.record import Patch

# Key in `kv_transfer_params` of an answer.
EVICTED = "cascade_evicted_tokens"


def install() -> None:
    """Wrap what the scheduler asks a KV connector when a request has ended."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler._connector_finished

    @functools.wraps(original)
    def connector_finished(self: Any, request: Any) -> tuple[bool, dict[str, Any] | None]:
        delays, params = original(self, request)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if hasattr(manager, "num_evicted"):
                evicted = manager.num_evicted(request.num_prompt_tokens, request.num_output_tokens)
                params = {**(params or {}), EVICTED: evicted}
        return delays, params

    Scheduler._connector_finished = connector_finished


PATCH = Patch(
    name="evicted_tokens",
    target="vllm.v1.core.sched.scheduler.Scheduler._connector_finished",
    signature="(self, request)",
    symptom=(
        "An answer does not tell how many tokens of its request the cache had dropped when it ended"
    ),
    removal="vLLM lets a KV cache manager add to what an answer says of its request",
    install=install,
)
