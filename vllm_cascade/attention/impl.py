"""One cascade layer's forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_cascade.attention.cpu_layer import CpuLayer
from vllm_cascade.attention.cpu_step import CascadeMetadata
from vllm_cascade.attention.rope import Rope
from vllm_cascade.attention.scales import scales_of
from vllm_cascade.attention.trace import Seen
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.support import unsupported
from vllm_cascade.support.drafts import is_drafters
from vllm_cascade.support.resolved import resolve_options
from vllm_cascade.support.unsupported import UnsupportedError

if TYPE_CHECKING:
    from vllm_cascade.attention.gpu_layer import GpuLayer
    from vllm_cascade.attention.gpu_step import GpuMetadata


class CascadeImpl(AttentionImpl[Any]):
    """One layer's forward pass: hands each step to a `CpuLayer` or a `GpuLayer`.

    Keys arrive and are kept before RoPE: once the model is loaded, a patch takes each layer's
    rotary embedding out of the model and hands it over (`bind_rope`).

    Raises:
        UnsupportedError: The layer is of a kind that CASCADE cannot serve.
        ConfigError: The cascade's options cannot work with this model.
    """

    # vLLM makes the KV cache specs after the layers, and sets no current configuration then. So
    # each layer leaves its configuration here.
    _vllm_config: ClassVar[VllmConfig]
    _alive: ClassVar[WeakSet[CascadeImpl]] = WeakSet()

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        check_layer(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            kv_cache_dtype=kv_cache_dtype,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            **extra,
        )
        vllm_config = get_current_vllm_config()
        if not is_drafters(vllm_config):
            # A drafter is loaded after its model, and keeps what the model keeps.
            CascadeImpl._vllm_config = vllm_config
        CascadeImpl._alive.add(self)
        self.config = self.resolve_config()
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.is_fp8 = unsupported.is_fp8(kv_cache_dtype)
        self.sinks = sinks
        self.soft_cap = float(logits_soft_cap or 0)
        # `bind_rope` makes the worker.
        self.worker: CpuLayer | GpuLayer | None = None
        self.pages: Pages | None = None
        # vLLM's scales of keys and values, of which the pages have views.
        self._scales: tuple[torch.Tensor, ...] = ()
        self.seen: Seen | None = None

    @classmethod
    def resolve_config(cls) -> CascadeConfig:
        """Settle the options for the model loaded last."""
        return resolve_options(cls._vllm_config)

    @property
    def num_positions(self) -> int:
        """Logical places that the layer can rotate at."""
        return min(self.config.max_places, self.config.max_model_len)

    def bind_rope(self, rope: Rope) -> None:
        """Take over the rotary embedding that the model would apply before this layer.

        Args:
            rope: The embedding, with a table of at least `num_positions` positions.
        """
        cos, sin = rope.tables
        if cos.device.type == "cpu":
            self.worker = CpuLayer(
                self.config, self.scale, cos, sin, rope.is_neox_style, self.sinks, self.soft_cap
            )
            return
        from vllm_cascade.attention.gpu_layer import GpuLayer
        from vllm_cascade.attention.gpu_workspace import Shape, shared_workspace

        vllm_config = self._vllm_config
        shape = Shape(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            vllm_config.model_config.dtype,
            None if self.sinks is None else self.sinks.dtype,
            torch.float8_e4m3fn if self.is_fp8 else None,
        )
        scheduler = vllm_config.scheduler_config
        workspace = shared_workspace(
            self.config,
            shape,
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
            cos.device,
            1 + vllm_config.num_speculative_tokens,
        )
        self.worker = GpuLayer(
            self.config,
            shape,
            self.scale,
            cos,
            sin,
            rope.is_neox_style,
            workspace,
            self.sinks,
            self.soft_cap,
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CascadeMetadata | GpuMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend a batch, where vLLM's implementations expect rotated queries and keys.

        Args:
            layer: vLLM's attention layer, which has the scales of keys and values in FP8.
            query: [num_tokens, num_heads, head_size] before RoPE.
            key: [num_tokens, num_kv_heads, head_size] before RoPE.
            value: [num_tokens, num_kv_heads, head_size_v].
            kv_cache: [num_blocks, num_kv_heads, block_size, head_size + head_size_v], uint8 where
                keys and values are in FP8. What a page keeps beside them may follow as more heads.
            attn_metadata: The step, for the layer's device; None in a profiling run, which gives
                zeros.
            output: [num_tokens, num_heads, head_size_v], written in place.
            output_scale: Not used: the backend supports no quantized output.
            output_block_scale: Not used.

        Returns:
            `output`.
        """
        if attn_metadata is None or kv_cache.numel() == 0:
            return output.zero_()
        assert self.worker is not None
        pages = self._pages_of(kv_cache, layer)
        self.worker.forward(query, key, value, pages, attn_metadata, output)
        return output

    @classmethod
    def pages_in(cls, kv_caches: Iterable[torch.Tensor]) -> list[Pages]:
        """Find the pages of a model's CASCADE layers.

        Args:
            kv_caches: A model's KV caches, as `kv_cache` of `forward`; other layers' may be among
                them.

        Returns:
            The pages of each CASCADE layer that has attended before.
        """
        addresses = {kv_cache.data_ptr() for kv_cache in kv_caches}
        pages = [impl.pages for impl in cls._alive if impl.pages]
        return [each for each in pages if each.kv.data_ptr() in addresses]

    def _pages_of(self, kv_cache: torch.Tensor, layer: torch.nn.Module) -> Pages:
        if self.is_fp8:
            # Loading weights again may leave others.
            scales = layer._k_scale, layer._v_scale
            if any(a is not b for a, b in zip_longest(scales, self._scales)):
                self._scales, self.pages = scales, None
        if self.pages is None or self.pages.kv.data_ptr() != kv_cache.data_ptr():
            views: tuple[torch.Tensor, ...] = ()
            if self.is_fp8:
                kv_cache = kv_cache.view(torch.float8_e4m3fn)
                views = scales_of(layer, self.num_kv_heads)
            config, kv_cache = self.config, kv_cache[:, : self.num_kv_heads]
            self.pages = Pages.view(kv_cache, config.needs_scores, config.trace_tokens, *views)
        return self.pages


def check_layer(
    *,
    alibi_slopes: Any,
    sliding_window: int | None,
    kv_cache_dtype: str,
    logits_soft_cap: float | None,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
    **extra: Any,
) -> None:
    """Refuse an attention layer that only the model's code shows to be unsupported.

    Args:
        alibi_slopes: As of vLLM's `AttentionImpl`; has to be None.
        sliding_window: The layer's window in tokens; has to be None.
        kv_cache_dtype: As --kv-cache-dtype; has to be "auto", a floating-point type of 16 or 32
            bits, or FP8 (e4m3).
        logits_soft_cap: As of vLLM's `AttentionImpl`; has to be None, 0 or a positive number.
        attn_type: vLLM's `AttentionType`; has to be "decoder".
        kv_sharing_target_layer_name: The layer whose KV cache this one reads; has to be None.
        extra: What the model gives vLLM's layer beside; has to be None, False or -1 each.

    Raises:
        UnsupportedError: The message names what the layer asks for.
    """
    if attn_type != "decoder":
        raise UnsupportedError(
            f"{attn_type} attention", "only causal decoder attention has a cache to cut"
        )
    if alibi_slopes is not None:
        raise unsupported.alibi()
    if sliding_window is not None:
        raise unsupported.sliding_window(sliding_window)
    unsupported.check_soft_cap(logits_soft_cap)
    if kv_sharing_target_layer_name is not None:
        raise unsupported.shared_kv(
            f"a layer that shares the KV cache of {kv_sharing_target_layer_name}"
        )
    for name, value in extra.items():
        if value is not None and value is not False and value != -1:
            raise UnsupportedError(
                f"a layer with {name} = {value!r}", "it knows no attention with this option"
            )
    known = ("auto", "float32", "bfloat16", "float16", *unsupported.FP8_DTYPES)
    if kv_cache_dtype not in known:
        raise unsupported.kv_dtype(kv_cache_dtype)
