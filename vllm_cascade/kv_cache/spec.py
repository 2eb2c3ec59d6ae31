"""The KV cache spec of a cascade layer: what a page holds and how much a request may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.support.unsupported import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCORE_BYTES = 4
TRACE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class CascadeSpec(AttentionSpec):
    """Pages of K and V, plain as vLLM's own unless something is kept beside them.

    For policies with attention scores one fp32 score per KV head and slot follows in the padded
    tail, and with ``trace_tokens`` an int32 token index. Not a
    `FullAttentionSpec`: vLLM takes that as "every token has a slot".

    Args:
        config: The resolved configuration; carries the structure to the scheduler's process.
    """

    config: CascadeConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        tail = _tail_bytes(self, self.config)
        fits = not tail or self.page_size_padded in (None, self.unpadded_page_size_bytes + tail)
        if self.block_size == self.config.block_size and fits:
            return
        # vLLM has stretched this spec to the pages of other layers.
        why = (
            "pages of all layers overlay each other, and what is kept behind keys and values "
            "would be read as such"
        )
        if self.block_size != self.config.block_size:
            why = (
                f"blocks of {self.config.block_size} tokens would become blocks of "
                f"{self.block_size}, for which the cascade is not laid out"
            )
        raise UnsupportedError(
            "a model whose other layers take more KV memory per block than its full-attention "
            "layers",
            why,
        )

    @classmethod
    def of(cls, spec: AttentionSpec, config: CascadeConfig) -> CascadeSpec:
        """The cascade's spec for a layer that vLLM described as `spec`.

        Args:
            spec: vLLM's spec of the layer, its block size being ``config.block_size``.
            config: The resolved configuration.

        Returns:
            The spec, with a page size that counts scores and trace.
        """
        tail = _tail_bytes(spec, config)
        padded = spec.unpadded_page_size_bytes + tail if tail else None
        return cls(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            page_size_padded=padded,
            dcp_sharded=False,
            config=config,
        )

    @property
    def prefix_cacheable(self) -> bool:
        # Takes part in look-ups, so that its manager vetoes what other layers' caches hit.
        return True

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    @property
    def block_table_token_alignment(self) -> int | None:
        return None

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of this layer's pages that the longest request holds."""
        need = build_layout(self.config).need(vllm_config.model_config.max_model_len)
        return need * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Width of a request's row in the worker's block table.

        Rows never hold more than R blocks. Model runner V1 computes slots from the token index
        all the same and would read past a narrower row; V2 does not, but its warm-up hands out
        a block for every token of a batch.
        """
        if not vllm_config.use_v2_model_runner:
            return cdiv(max_len, self.block_size)
        batch = vllm_config.scheduler_config.max_num_batched_tokens
        return max(build_layout(self.config).max_blocks, cdiv(batch, self.block_size) + 1)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(isinstance(spec, CascadeSpec) for spec in kv_cache_specs.values())


def _tail_bytes(spec: AttentionSpec, config: CascadeConfig) -> int:
    """Bytes of a page behind K and V."""
    slots = spec.num_kv_heads * spec.block_size
    return slots * (SCORE_BYTES * config.needs_scores + TRACE_BYTES * config.trace_tokens)
