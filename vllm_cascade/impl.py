"""One cascade layer's forward pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_cascade.config import CascadeConfig
from vllm_cascade.kernels import cpu_attention, cpu_compaction
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.metadata import CascadeMetadata
from vllm_cascade.rope import Rope
from vllm_cascade.trace import Seen
from vllm_cascade.validation import check_layer, resolve_options


class CascadeImpl(AttentionImpl[CascadeMetadata]):
    """Writes, attends, scores and merges, wave by wave.

    Keys arrive and are kept before RoPE: the loader hands each layer its rotary embedding
    (`bind_rope`) and takes it out of the model.
    """

    # vLLM makes the KV cache specs after the layers, without a current configuration.
    _vllm_config: ClassVar[VllmConfig]

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
            sinks=sinks,
        )
        CascadeImpl._vllm_config = get_current_vllm_config()
        self.config = self.resolve_config(self._vllm_config.cache_config.block_size)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.rotary: cpu_attention.Rotary | None = None
        self.pages: Pages | None = None
        self.seen: Seen | None = None

    @classmethod
    def resolve_config(cls, block_size: int) -> CascadeConfig:
        """The configuration of the model loaded last, for blocks of `block_size` tokens."""
        return resolve_options(cls._vllm_config, block_size)

    @property
    def num_positions(self) -> int:
        """Logical places that are ever rotated at."""
        return min(self.config.max_places, self.config.max_model_len)

    def bind_rope(self, rope: Rope) -> None:
        """Take over the rotary embedding that the model applied before this layer.

        Args:
            rope: Its table, at least `num_positions` long.
        """
        cos, sin = rope.cos_sin_cache[: self.num_positions].float().chunk(2, dim=-1)
        self.rotary = cpu_attention.Rotary(cos.contiguous(), sin.contiguous(), rope.is_neox_style)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CascadeMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend a batch.

        Args:
            layer: The attention layer.
            query: [num_tokens, num_heads, head_size] before RoPE.
            key: [num_tokens, num_kv_heads, head_size] before RoPE.
            value: [num_tokens, num_kv_heads, head_size_v].
            kv_cache: [num_blocks, num_kv_heads, block_size, head_size + head_size_v].
            attn_metadata: The step's waves; None in a profiling run.
            output: [num_tokens, num_heads, head_size_v], written in place.
            output_scale: Not supported.
            output_block_scale: Not supported.

        Returns:
            `output`.
        """
        if attn_metadata is None or kv_cache.numel() == 0:
            return output.zero_()
        assert self.rotary is not None
        config, pages = self.config, self._pages_of(kv_cache)
        scoring = None
        if config.needs_scores:
            scoring = cpu_attention.Scoring(config.score_power, config.score_reduction)
        for wave in attn_metadata.waves:
            pages.write(key[wave.rows], value[wave.rows], wave.block_ids, wave.offsets, wave.tokens)
            for segment in wave.prefills:
                cpu_attention.prefill(
                    output, query, pages, segment, self.rotary, self.scale, scoring
                )
            for batch in wave.decodes:
                cpu_attention.decode(output, query, pages, batch, self.rotary, self.scale, scoring)
            if wave.merge is not None:
                cpu_compaction.merge_groups(
                    pages, wave.merge, self.head_size, config.selection_window, config.key_weight
                )
        return output

    def _pages_of(self, kv_cache: torch.Tensor) -> Pages:
        if self.pages is None or self.pages.kv.data_ptr() != kv_cache.data_ptr():
            self.pages = Pages.view(kv_cache, self.config.needs_scores, self.config.trace_tokens)
        return self.pages
