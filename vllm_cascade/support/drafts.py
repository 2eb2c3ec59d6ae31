"""Speculative decoding: which drafters are served, and that their layers are CASCADE's too."""

from __future__ import annotations

from typing import Any

from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.support.hybrid import NAMES, other_kind
from vllm_cascade.support.names import is_cascade
from vllm_cascade.support.states import has_states
from vllm_cascade.support.unsupported import UnsupportedError

# Methods whose drafters have no KV cache of their own, and those whose drafters have one.
WITHOUT_CACHE = ("ngram", "ngram_gpu")
WITH_CACHE = ("draft_model", "eagle", "eagle3", "mtp")
# Those whose drafter also computes the token that has just been sampled.
WITH_SAMPLED = ("draft_model",)
INSTEAD = (
    'Use method "ngram" or "ngram_gpu", which draft from the text itself, or leave out '
    "--speculative-config"
)


def check_drafts(vllm_config: Any, config: CascadeConfig) -> None:
    """Refuse speculative decoding whose drafts the cache could not take back, or not bound.

    Args:
        vllm_config: vLLM's complete configuration.
        config: The resolved configuration of the cascade.

    Raises:
        UnsupportedError: The message names the method, or what it cannot work with.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if has_states(vllm_config.model_config):
        raise UnsupportedError(
            "speculative decoding of a model with state-space, linear-attention or convolution "
            "layers",
            "it has not been made for states that drafts have changed",
            "Leave out --speculative-config",
        )
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    if multimodal is not None and not multimodal.language_model_only:
        raise UnsupportedError(
            "speculative decoding of a model that takes images",
            "an image may cut a prompt where its few tokens would be taken for drafts",
            "Use --language-model-only to serve its text alone, or leave out --speculative-config",
        )
    if config.needs_scores:
        raise UnsupportedError(
            f"speculative decoding with policy {config.policy!r}",
            "a draft that is rejected would leave its attention scores behind",
            "Leave out --speculative-config, or use a policy without attention scores",
        )
    asked = f"speculative decoding by method {speculative.method!r}"
    if speculative.method in WITHOUT_CACHE:
        return
    if speculative.method not in WITH_CACHE:
        raise UnsupportedError(asked, "nobody has tried this drafter with it", INSTEAD)
    if other := other_kind(speculative.draft_model_config):
        raise UnsupportedError(
            f"{asked} with a drafter that has {NAMES[other]} layers",
            "nobody has tried it",
            f"Take a drafter with full attention alone. {INSTEAD}",
        )
    if vllm_config.device_config.device_type != "cpu":
        if not vllm_config.use_v2_model_runner:
            raise UnsupportedError(
                f"{asked} on a GPU with vLLM's model runner V1",
                "there nobody has made a drafter's own KV cache be bounded",
                "Unset VLLM_USE_V2_MODEL_RUNNER, or leave out the option that needs runner V1, "
                "which vLLM's log names",
            )
        if speculative.use_multi_module_mtp():
            raise UnsupportedError(
                f"{asked} with several MTP modules on a GPU",
                "nobody has tried it",
                "Give num_speculative_tokens 1, with which one module drafts",
            )
    kind = other_kind(vllm_config.model_config)
    if kind and speculative.method == "draft_model":
        raise UnsupportedError(
            f"{asked} for a model with {NAMES[kind]} layers",
            "vLLM's model runner V1 hands a draft model the blocks of other layers, whatever the "
            "attention backend, and nobody has tried it with runner V2",
            f"Take an EAGLE head. {INSTEAD}",
        )
    chosen = speculative.attention_backend
    if chosen is not None and not is_cascade(chosen):
        raise UnsupportedError(
            f"a drafter with attention backend {chosen.name}",
            "the drafter's KV cache would grow with the text",
            "Leave attention_backend out of --speculative-config",
        )


def bound_drafter(vllm_config: Any) -> None:
    """Give the drafter's layers to CASCADE, of as long requests as the model's.

    Args:
        vllm_config: vLLM's complete configuration, which `validate` has passed; changed in place.
    """
    speculative, attention = vllm_config.speculative_config, vllm_config.attention_config
    if speculative is None or speculative.method not in WITH_CACHE:
        return
    if is_cascade(attention.backend):
        speculative.attention_backend = attention.backend
        speculative.draft_model_config.max_model_len = vllm_config.model_config.max_model_len


def is_drafters(vllm_config: Any) -> bool:
    """Whether a configuration is that of a drafter which is a whole model.

    Args:
        vllm_config: vLLM's configuration while it builds a model.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method not in WITH_CACHE:
        # For n-grams vLLM calls the model itself the drafter's.
        return False
    return vllm_config.model_config is speculative.draft_model_config
