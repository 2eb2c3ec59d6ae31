"""The name by which users select CASCADE, and loggers that vLLM prints."""

from __future__ import annotations

from typing import Any

BACKEND_NAME = "CASCADE"


def is_cascade(backend: Any) -> bool:
    """Whether a backend is CASCADE.

    Args:
        backend: A member of vLLM's `AttentionBackendEnum`, a name as typed, or None.
    """
    return str(getattr(backend, "name", backend)).upper() == BACKEND_NAME


def log_of(module: str) -> Any:
    """The logger of a module, under vLLM's own root: vLLM prints nothing else.

    Args:
        module: The module's ``__name__``.
    """
    from vllm.logger import init_logger

    return init_logger(f"vllm.{module}")
