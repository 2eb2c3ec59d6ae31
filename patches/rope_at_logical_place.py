"""Hands the rotary embedding of each CASCADE layer to the backend when a model is loaded."""

from __future__ import annotations

import functools
from typing import Any

from vllm_cascade.patches.record import Patch


def install() -> None:
    """Wrap the model loader so that CASCADE layers receive unrotated queries and keys."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    original = BaseModelLoader.load_model

    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        from vllm_cascade.attention.rope import check_layers, take_over
        from vllm_cascade.support.selection import check_served
        from vllm_cascade.support.sleep import kept_asleep

        load_weights = self.load_weights

        def refuse_or_load_weights(model: Any, model_config: Any) -> None:
            # The weights of a large model take minutes, and its code is known before.
            check_served(model, vllm_config)
            check_layers(model)
            load_weights(model, model_config)

        self.load_weights = refuse_or_load_weights
        try:
            model = original(self, vllm_config, model_config, prefix)
        finally:
            del self.load_weights
        check_served(model, vllm_config)
        with kept_asleep(vllm_config):
            take_over(model)
        return model

    BaseModelLoader.load_model = load_model


PATCH = Patch(
    name="rope_at_logical_place",
    target="vllm.model_executor.model_loader.base_loader.BaseModelLoader.load_model",
    signature="(self, vllm_config, model_config, prefix='')",
    symptom=(
        "Models rotate queries and keys by their place in the text before the backend sees them; "
        "a cascade needs them rotated by their place in the cache"
    ),
    removal="vLLM lets an attention backend apply the rotary embedding itself",
    install=install,
)
