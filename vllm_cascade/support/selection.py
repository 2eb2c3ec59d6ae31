"""Which layers a configuration gives to CASCADE, and whether the backend takes them."""

from __future__ import annotations

from typing import Any

from vllm_cascade.support.names import is_cascade
from vllm_cascade.support.unsupported import (
    UnsupportedError,
    check_copies,
    check_gpu_head_size,
)


def selects_cascade(attention_config: Any, attention_backend: Any = None) -> bool:
    """Whether a configuration names CASCADE, for all layers or for one kind of layer.

    Args:
        attention_config: vLLM's `AttentionConfig`.
        attention_backend: The engine argument of that name, if vLLM has not merged it into
            `attention_config` yet.
    """
    chosen = [attention_backend, attention_config.backend]
    chosen += attention_config.backend_per_kind.values()
    return any(map(is_cascade, chosen))


def check_kinds(attention_config: Any) -> None:
    """Refuse a choice by kind of layer, unless CASCADE gets full attention and nothing else.

    Args:
        attention_config: vLLM's `AttentionConfig`.

    Raises:
        UnsupportedError: The message names the kind of layer.
    """
    for kind, backend in attention_config.backend_per_kind.items():
        if is_cascade(backend) != (kind == "full_attention"):
            raise UnsupportedError(
                f"backend_per_kind {kind} = {backend.name}",
                "it is for layers of kind full_attention, and for those only",
                "Use --attention-backend CASCADE alone",
            )


def check_selection(backend: Any, selection: Any) -> None:
    """Ask the backend, as vLLM does, whether it can serve a layer, and refuse the layer if not.

    Args:
        backend: The attention backend class.
        selection: vLLM's `AttentionSelectorConfig` of the layer.

    Raises:
        UnsupportedError: The message gives the backend's reasons.
    """
    reasons = backend.validate_configuration(device_capability=None, **selection._asdict())
    if reasons:
        raise UnsupportedError(
            f"attention layers of head size {selection.head_size} in {selection.dtype}",
            ", ".join(reasons),
        )


def check_served(model: Any, vllm_config: Any) -> None:
    """Refuse a built model if another backend serves one of its full-attention layers.

    A model may choose a layer's backend itself. Without this check the layer's cache would grow
    with the text, and its positions would pass the model's limit, and nobody would be told.
    What a layer has of its own, other than the configuration says, is checked too.

    Args:
        model: The `torch.nn.Module`; its weights need not be loaded.
        vllm_config: vLLM's complete configuration.

    Raises:
        UnsupportedError: The message names the layer, and its backend or what it has.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        EncoderOnlyAttentionSpec,
        MambaSpec,
        SlidingWindowSpec,
    )

    if not selects_cascade(vllm_config.attention_config):
        return
    bounded = ChunkedLocalAttentionSpec, EncoderOnlyAttentionSpec, MambaSpec, SlidingWindowSpec
    for name, layer in model.named_modules():
        if not isinstance(layer, AttentionLayerBase):
            continue
        backend = layer.get_attn_backend().get_name()
        if is_cascade(backend):
            parent = model.get_submodule(name.rpartition(".")[0])
            _check_layer(name, layer, parent, vllm_config)
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is not None and not isinstance(spec, bounded):
            raise UnsupportedError(
                f"this model's layer {name}",
                f"it attends in full by {backend}, which the model names itself, so CASCADE would "
                "not bound its memory",
            )


def _check_layer(name: str, layer: Any, parent: Any, vllm_config: Any) -> None:
    from vllm.model_executor.layers.attention import Attention
    from vllm.platforms import current_platform

    if type(layer).get_kv_cache_spec is not Attention.get_kv_cache_spec:
        raise UnsupportedError(
            f"this model's layer {name}",
            f"it is a {type(layer).__name__}, which keeps more than a layer's keys and values",
        )
    if layer.head_size_v != layer.head_size:
        raise UnsupportedError(
            f"this model's layer {name}",
            f"its values have {layer.head_size_v} channels and its keys {layer.head_size}",
        )
    if vllm_config.device_config.device_type == "cuda":
        # A model's layers may have heads of several sizes, of which its configuration names one.
        check_gpu_head_size(layer.head_size, current_platform.get_device_capability())
    config = layer.impl.config
    total = getattr(parent, "total_num_kv_heads", None)
    if config.needs_scores and total is not None:
        check_copies(vllm_config.parallel_config.tensor_parallel_size, total, config.policy)


def layer_of(vllm_config: Any) -> Any:
    """Describe a model's layers as vLLM's selector does, from the configuration alone.

    Args:
        vllm_config: vLLM's complete configuration.

    Returns:
        vLLM's `AttentionSelectorConfig`; what only a loaded layer shows has its default.
    """
    import vllm.envs as envs
    from vllm.v1.attention.selector import AttentionSelectorConfig

    model, cache = vllm_config.model_config, vllm_config.cache_config
    return AttentionSelectorConfig(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=cache.cache_dtype,
        block_size=cache.block_size,
        use_mm_prefix=model.is_mm_prefix_lm,
        use_non_causal=vllm_config.attention_config.use_non_causal,
        use_batch_invariant=envs.VLLM_BATCH_INVARIANT,
        use_rswa=model.rswa_window is not None,
    )
