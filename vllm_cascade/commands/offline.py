"""vLLM's configuration of a model, checked as for a server; no engine starts."""

from __future__ import annotations

from typing import Any

from vllm_cascade.commands.errors import CommandError


def engine_config(**options: Any) -> Any:
    """Make vLLM's configuration as an engine would; the plugin's checks run too.

    Args:
        options: Fields of vLLM's `EngineArgs`.

    Returns:
        vLLM's `VllmConfig`.

    Raises:
        OSError: The model's configuration cannot be read.
        CommandError: vLLM or the plugin refuses; the message has their own words.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_cascade.plugin import register

    register()
    try:
        return EngineArgs(**options).create_engine_config()
    except OSError:
        raise
    except Exception as error:  # what was given may be wrong in any way
        raise CommandError(said(error)) from error


def said(error: Exception) -> str:
    """Give the message of `error`; pydantic's report of several lines is put in one."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        parts = []
        for part in error.errors():
            given = "" if part["type"] == "value_error" else f"{part['input']!r}: "
            parts.append(given + part["msg"].removeprefix("Value error, "))
        return "; ".join(parts)
    return str(error) or type(error).__name__
