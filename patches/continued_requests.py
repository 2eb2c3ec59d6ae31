"""Lets a request go on where a finished request ended, with that request's blocks or a copy."""

from __future__ import annotations

import functools
from typing import Any

from vllm_cascade.patches.record import Patch


def install() -> None:
    """Wrap vLLM's look-up of the blocks that are cached for a waiting request."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    original = KVCacheManager.get_computed_blocks

    @functools.wraps(original)
    def get_computed_blocks(
        self: Any, request: Any, max_cache_hit_length: int | None = None
    ) -> Any:
        managers = self.coordinator.single_type_managers
        # With other caches beside CASCADE's, layers of other backends would have to go on too.
        is_alone = len(managers) == 1 and hasattr(managers[0], "continued_by")
        if is_alone and self.prefix_cache_lookup_enabled(request):
            # The last token has to be computed: its logits give the next token.
            most = request.num_tokens - 1
            if max_cache_hit_length is not None:
                most = min(most, max_cache_hit_length)
            blocks, num_tokens = managers[0].continued_by(request, most)
            if num_tokens:
                return self.create_kv_cache_blocks((blocks,)), num_tokens, 0
        limit = () if max_cache_hit_length is None else (max_cache_hit_length,)
        return original(self, request, *limit)

    KVCacheManager.get_computed_blocks = get_computed_blocks


PATCH = Patch(
    name="continued_requests",
    target="vllm.v1.core.kv_cache_manager.KVCacheManager.get_computed_blocks",
    signature="(self, request)",
    later_signature="(self, request, max_cache_hit_length=None)",
    symptom=(
        "A prefix is found in whole blocks of tokens only, and shared; what a cascade holds can be "
        "taken over by one request, at the very token where another ended. A chat's next turn "
        "would compute the whole chat again"
    ),
    removal="a KV cache manager may say how many tokens the blocks it finds stand for",
    install=install,
)
