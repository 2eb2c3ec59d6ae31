"""One cascade layer's forward pass on a CPU: write, attend, score and merge, wave by wave."""

from __future__ import annotations

import torch

from vllm_cascade.attention.cpu_step import CascadeMetadata
from vllm_cascade.kernels.cpu import attention as cpu_attention
from vllm_cascade.kernels.cpu import merge as cpu_compaction
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.weights import Weights
from vllm_cascade.structure.config import CascadeConfig


class CpuLayer:
    """Attends the batches of one layer.

    Args:
        config: A valid configuration.
        scale: Factor on the attention logits.
        cos: [num_positions, rotary_dim / 2] float32 cosines.
        sin: [num_positions, rotary_dim / 2] float32 sines.
        is_neox: Whether channel i is paired with i + rotary_dim / 2, or 2i with 2i + 1.
        sinks: [num_heads] sink logits, which join the softmax's denominator, or None.
        soft_cap: Soft cap on the attention logits, or 0 for none.
    """

    def __init__(
        self,
        config: CascadeConfig,
        scale: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        is_neox: bool,
        sinks: torch.Tensor | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        self.config = config
        self.scale = scale
        self.sinks = sinks
        self.soft_cap = soft_cap
        self.rotary = cpu_attention.Rotary(cos, sin, is_neox)
        self.weights = Weights(config.score_weight, config.key_weight, config.value_weight)
        self.scoring = None
        if config.needs_scores:
            self.scoring = cpu_attention.Scoring(config.score_power, config.score_reduction)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: Pages,
        metadata: CascadeMetadata,
        output: torch.Tensor,
    ) -> None:
        """Attend one step's batch.

        Args:
            query: [num_tokens, num_heads, head_size] before RoPE.
            key: [num_tokens, num_kv_heads, head_size] before RoPE.
            value: [num_tokens, num_kv_heads, head_size_v].
            pages: The layer's pages.
            metadata: The step.
            output: [num_tokens, num_heads, head_size_v], written where the batch has tokens.
        """
        # In every step, because the model's weights may be loaded again.
        sinks = None if self.sinks is None else self.sinks.float()
        how = (self.rotary, self.scale, self.scoring, sinks, self.soft_cap)
        for wave in metadata.waves:
            pages.write(key[wave.rows], value[wave.rows], wave.block_ids, wave.offsets, wave.tokens)
            for segment in wave.prefills:
                cpu_attention.prefill(output, query, pages, segment, *how)
            for batch in wave.decodes:
                cpu_attention.decode(output, query, pages, batch, *how)
            if wave.merge is not None:
                cpu_compaction.merge_groups(
                    pages, wave.merge, key.shape[2], self.config.selection_window, self.weights
                )
