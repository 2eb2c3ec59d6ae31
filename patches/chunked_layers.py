"""Keeps CASCADE out of layers of chunked local attention, which choose a backend by themselves."""

from __future__ import annotations

import functools
from typing import Any

from vllm_cascade.patches.record import Patch


def install() -> None:
    """Wrap the constructor of such layers, which asks for the backend of full attention."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

    original = ChunkedLocalAttention.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_cascade.support.names import is_cascade
        from vllm_cascade.support.selection import selects_cascade

        attention = get_current_vllm_config().attention_config
        if not selects_cascade(attention):
            original(self, *args, **kwargs)
            return
        backend, per_kind = attention.backend, attention.backend_per_kind
        chosen = per_kind.get("chunked_local_attention", backend)
        attention.backend, attention.backend_per_kind = None if is_cascade(chosen) else chosen, {}
        try:
            original(self, *args, **kwargs)
        finally:
            attention.backend, attention.backend_per_kind = backend, per_kind

    ChunkedLocalAttention.__init__ = init  # type: ignore[method-assign]


PATCH = Patch(
    name="chunked_layers",
    target=(
        "vllm.model_executor.layers.attention.chunked_local_attention."
        "ChunkedLocalAttention.__init__"
    ),
    signature=(
        "(self, num_heads, head_size, scale, attention_chunk_size, num_kv_heads=None, "
        "alibi_slopes=None, cache_config=None, quant_config=None, "
        "kv_sharing_target_layer_name=None, prefix='')"
    ),
    symptom=(
        "A layer of chunked local attention asks for the backend of full attention, so that it "
        "gets CASCADE, which attends to no chunks"
    ),
    removal="vLLM lets a user choose the backend of such layers by their kind",
    install=install,
)
