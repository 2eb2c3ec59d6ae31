"""vLLM plugin that serves models through a cascading KV cache of fixed size."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def _restore() -> Any:
    """The enum member CASCADE: what it unpickles to, where the plugin may not be loaded yet.

    The name and place of this function are part of every pickled configuration.
    """
    from vllm_cascade.plugin import register_name

    return register_name()
