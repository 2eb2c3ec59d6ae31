"""Checks and completes a CASCADE configuration in the user's own process."""

from __future__ import annotations

import functools
import sys
from typing import Any

from vllm_cascade.patches.record import Patch


def install() -> None:
    """Wrap the step that turns engine arguments into a configuration."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, usage_context: Any = None, headless: bool = False) -> Any:
        from vllm_cascade.patches.long_max_model_len import cascade_selected
        from vllm_cascade.structure.config import ConfigError
        from vllm_cascade.support.drafts import bound_drafter
        from vllm_cascade.support.hybrid import delegate_windows
        from vllm_cascade.support.selection import selects_cascade
        from vllm_cascade.support.states import leave_states
        from vllm_cascade.support.unsupported import UnsupportedError
        from vllm_cascade.support.validate import validate

        token = cascade_selected.set(selects_cascade(self.attention_config, self.attention_backend))
        try:
            vllm_config = original(self, usage_context, headless)
        finally:
            cascade_selected.reset(token)
        try:
            validate(vllm_config)
        except (ConfigError, UnsupportedError) as error:
            if _is_command_line():
                # A user of `vllm serve` gets one line; a traceback would tell the user no more.
                raise SystemExit(f"vllm: {error}") from None
            raise
        bound_drafter(vllm_config)
        delegate_windows(vllm_config)
        leave_states(vllm_config)
        return vllm_config

    EngineArgs.create_engine_config = create_engine_config


def _is_command_line() -> bool:
    """Whether vLLM's own program runs, and not a program that may catch an error."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    # The script `vllm` is no module itself, but imports a function `main` from a module of vLLM.
    name = spec.name if spec is not None else getattr(getattr(main, "main", None), "__module__", "")
    return str(name).startswith("vllm.entrypoints.")


PATCH = Patch(
    name="front_end_validation",
    target="vllm.engine.arg_utils.EngineArgs.create_engine_config",
    signature="(self, usage_context=None, headless=False)",
    symptom=(
        "A backend sees the configuration only in the worker, where a refusal is buried under "
        "the engine's own failure; nothing refuses cascade options given without CASCADE; and a "
        "backend chosen for a model gets its sliding-window layers too"
    ),
    removal="vLLM lets plugins check and change the configuration in the front end",
    install=install,
)
