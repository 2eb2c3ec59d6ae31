"""The name by which users select CASCADE, and loggers whose lines vLLM prints."""

from __future__ import annotations

from typing import Any

BACKEND_NAME = "CASCADE"


def is_cascade(backend: Any) -> bool:
    """Whether a backend is CASCADE.

    Args:
        backend: A member of vLLM's `AttentionBackendEnum`, a name in any case, or None.
    """
    return str(getattr(backend, "name", backend)).upper() == BACKEND_NAME


def log_of(module: str) -> Any:
    """Give a module's logger, with a name below ``vllm``: vLLM prints no other logger's lines.

    Args:
        module: The module's ``__name__``.

    Returns:
        vLLM's logger, with `info_once` and `warning_once`.
    """
    from vllm.logger import init_logger

    return init_logger(f"vllm.{module}")
