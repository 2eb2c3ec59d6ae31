"""The scales of a layer that keeps keys and values in FP8, as vLLM has loaded them."""

from __future__ import annotations

from typing import Any

import torch

from vllm_cascade.support.names import log_of
from vllm_cascade.support.unsupported import UnsupportedError, is_fp8


def scales_of(layer: Any, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the scales of a layer's keys and values, as `Pages` takes them.

    Args:
        layer: vLLM's attention layer.
        num_kv_heads: KV heads on this rank.

    Returns:
        Two views of vLLM's own buffers, each [num_kv_heads] float32: what is written to a buffer
        later counts, in CUDA graphs too.
    """
    return (
        layer._k_scale.view(-1).expand(num_kv_heads),
        layer._v_scale.view(-1).expand(num_kv_heads),
    )


def check_scales(layer: Any) -> None:
    """Refuse scales that FP8 cannot use, and warn once where a checkpoint brings none.

    Layers that keep no FP8 pass.

    Args:
        layer: vLLM's attention layer, its weights loaded.

    Raises:
        UnsupportedError: A scale is not above zero or not finite, or there are neither one nor as
            many as the layer has KV heads.
    """
    if not is_fp8(layer.kv_cache_dtype):
        return
    ones = True
    for name in ("_k_scale", "_v_scale"):
        scale = getattr(layer, name)
        if scale.numel() not in (1, layer.num_kv_heads) or scale.dtype != torch.float32:
            raise _refusal(layer, name, f"it has {scale.numel()} numbers of {scale.dtype}")
        if not ((scale > 0) & scale.isfinite()).all():
            raise _refusal(layer, name, f"it is {scale.tolist()}")
        ones = ones and bool((scale == 1).all())
    if ones and not _vllm_warns(layer):
        log_of(__name__).warning_once(
            "KV cache in FP8 with scale 1.0 for all keys and values: the checkpoint brings no "
            "scales. What is beyond 448 is stored as 448. Answers may be worse; a checkpoint with "
            "calibrated k_scale and v_scale avoids that."
        )


def _refusal(layer: Any, name: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"layer {layer.layer_name} with FP8 scale {name.strip('_')} as loaded",
        f"a scale is one float32 number above zero, or one for each of {layer.num_kv_heads} KV "
        f"heads; {found}",
        "Use --kv-cache-dtype auto, or a checkpoint with other scales",
    )


def _vllm_warns(layer: Any) -> bool:
    """Whether vLLM has warned of scales of 1.0, as it does for some quantized checkpoints."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    method = type(getattr(layer, "quant_method", None))
    process = getattr(method, "process_weights_after_loading", None)
    return process is BaseKVCacheMethod.process_weights_after_loading
