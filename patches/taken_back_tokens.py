"""Has a streaming session begin again where vLLM takes back tokens that a boundary has used."""

from __future__ import annotations

import functools
from typing import Any

from vllm_cascade.patches.record import Patch


def install() -> None:
    """Wrap the scheduler's update of a session whose next input has come."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import MambaManager

    original = Scheduler._update_request_as_session

    @functools.wraps(original)
    def update_request_as_session(self: Any, session: Any, update: Any) -> None:
        # The token that ends a turn is dropped, and with it drafts that were accepted behind it.
        # Without drafts it has not been computed.
        num_computed = session.num_computed_tokens
        session.num_computed_tokens = min(num_computed, session.num_tokens - 1)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        cascades = [manager for manager in managers if hasattr(manager, "cannot_take_back")]
        begins_again = any(
            manager.cannot_take_back(session.request_id, session.num_computed_tokens)
            for manager in cascades
        )
        if cascades and num_computed > session.num_computed_tokens:
            # A state has all tokens in it that were computed.
            begins_again |= any(isinstance(manager, MambaManager) for manager in managers)
        original(self, session, update)
        if begins_again:
            self._free_request_blocks(session)
            # Then vLLM looks up where the session can go on, as it does for a new request.
            session.num_computed_tokens = 0

    Scheduler._update_request_as_session = update_request_as_session


PATCH = Patch(
    name="taken_back_tokens",
    target="vllm.v1.core.sched.scheduler.Scheduler._update_request_as_session",
    signature="(self, session, update)",
    symptom=(
        "With asynchronous scheduling, a turn of a streaming session that ends at a stop token "
        "takes back the tokens of steps under way. If one of them ran a boundary, blocks were "
        "merged that the next turn would merge again. With speculative decoding, drafts that were "
        "accepted behind a stop token count as tokens of the next turn's input"
    ),
    removal="vLLM asks the KV cache manager whether computed tokens can be taken back",
    install=install,
)
