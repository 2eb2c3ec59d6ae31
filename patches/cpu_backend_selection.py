"""Lets the CPU platform take the backend CASCADE, after vLLM's own checks of the backend."""

from __future__ import annotations

import functools
from typing import Any

from vllm_cascade.patches.record import Patch
from vllm_cascade.support.names import is_cascade


def install() -> None:
    """Wrap the CPU platform's choice of an attention backend."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.get_attn_backend_cls.__func__

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if not is_cascade(selected_backend):
            return original(cls, selected_backend, attn_selector_config, num_heads)
        from vllm_cascade.support.selection import check_selection

        check_selection(selected_backend.get_class(), attn_selector_config)
        return selected_backend.get_path()

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


PATCH = Patch(
    name="cpu_backend_selection",
    target="vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls",
    signature="(selected_backend, attn_selector_config, num_heads=None)",
    symptom=(
        "On a CPU every backend but vLLM's own is dropped with a log line, and the model runs "
        "with full attention"
    ),
    removal="the CPU platform honours registered backends, as the CUDA platform does",
    install=install,
)
