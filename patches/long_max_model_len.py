"""Accepts a --max-model-len beyond the model's own limit, for CASCADE only."""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from typing import Any

from vllm_cascade.patches.record import Patch
from vllm_cascade.support.names import log_of

# True while the front end builds a configuration that selects CASCADE. vLLM's check does not see
# the backend, and vLLM's own switch, an environment variable, would unlock other backends too.
cascade_selected: ContextVar[bool] = ContextVar("cascade_selected", default=False)


def install() -> None:
    """Wrap vLLM's check of max_model_len against the model's configuration."""
    from vllm.config import model as target

    logger = log_of(__name__)
    original = target._get_and_verify_max_len
    signature = inspect.signature(original)

    @functools.wraps(original)
    def verify(*args: Any, **kwargs: Any) -> int:
        call = signature.bind(*args, **kwargs)
        asked = call.arguments["max_model_len"]
        # With sliding windows disabled the limit is the window. In training no token attended to
        # another beyond the window, so CASCADE leaves this limit in place.
        if (
            not cascade_selected.get()
            or asked is None
            or asked < 0
            or call.arguments["disable_sliding_window"]
        ):
            return original(*args, **kwargs)
        call.arguments["max_model_len"] = None
        limit = original(*call.args, **call.kwargs)
        if asked > limit:
            logger.info_once(
                "max_model_len %d is beyond the model's own %d positions: CASCADE rotates keys by "
                "their place in the cache, which stays within them.",
                asked,
                limit,
            )
        return asked

    target._get_and_verify_max_len = verify


PATCH = Patch(
    name="long_max_model_len",
    target="vllm.config.model._get_and_verify_max_len",
    signature=(
        "(hf_config, model_arch_config, tokenizer_config, max_model_len, disable_sliding_window, "
        "sliding_window, spec_target_max_model_len=None, encoder_config=None)"
    ),
    symptom=(
        "vLLM refuses a --max-model-len beyond the model's own limit, though positions in a "
        "cascade never pass the budget; other backends still refuse"
    ),
    removal="vLLM asks the attention backend which lengths it can serve",
    install=install,
)
