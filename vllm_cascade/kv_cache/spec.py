"""The KV cache spec of a cascade layer: what a page holds, and how many pages a request takes."""

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
    """Pages of keys and values, plain as vLLM's own, with a tail where more is kept.

    With attention scores, a page's padded tail holds one float32 score per KV head and slot. With
    ``trace_tokens`` an int32 token index per KV head and slot follows. The class does not derive
    from `FullAttentionSpec`, which tells vLLM that every token has a slot.

    A block may be a multiple of ``config.block_size``. Then vLLM divides each block of the worker's
    tables and pages into blocks of that size. It divides no padded pages, so what is kept beside
    keys and values takes the place of further heads there.

    Args:
        config: The resolved configuration; the spec carries it to the scheduler's process.

    Raises:
        UnsupportedError: vLLM has stretched a page with a tail to the size of another layer's.
    """

    config: CascadeConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        tail = _tail_bytes(self, self.config)
        if not tail or self.num_head_slots is not None:
            return
        padded = self.unpadded_page_size_bytes + tail
        is_whole = self.parts == 1 and self.page_size_padded in (None, padded)
        if not (is_whole or self.is_of_a_token):
            # vLLM has stretched this spec, to make its pages as large as those of other layers.
            raise UnsupportedError(
                "a model whose other layers take more KV memory per block than its full-attention "
                "layers",
                "pages of all layers overlay each other, and what is kept behind keys and values "
                "would be read as such",
            )

    @classmethod
    def of(
        cls, spec: AttentionSpec, config: CascadeConfig, *, tail_in_heads: bool = False
    ) -> CascadeSpec:
        """Make the cascade's spec of a layer from vLLM's.

        Args:
            spec: vLLM's spec of the layer, with blocks of a multiple of ``config.block_size``, or
                of one token.
            config: The resolved configuration.
            tail_in_heads: Whether what is kept beside keys and values takes the place of further
                heads: a little more memory, for pages that are as large as their tokens times one
                size, and that vLLM may divide.

        Returns:
            The spec; its page size counts scores and token indices.
        """
        tail, slots, padded = _tail_bytes(spec, config), None, None
        if tail and tail_in_heads:
            head = spec.block_size * spec.state_content_size_bytes
            slots = spec.num_kv_heads + cdiv(tail, head)
        elif tail:
            padded = spec.unpadded_page_size_bytes + tail
        return cls(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            num_head_slots=slots,
            page_size_padded=padded,
            dcp_sharded=False,
            config=config,
        )

    @property
    def is_of_a_token(self) -> bool:
        """Whether vLLM only wants to know how many bytes a token takes."""
        return self.block_size == 1

    @property
    def max_blocks(self) -> int:
        """The most blocks that a request holds: those in which R of the cascade's own lie."""
        return cdiv(build_layout(self.config).max_blocks, self.parts)

    def need(self, num_tokens: int) -> int:
        """Count the blocks that a request holds once `num_tokens` tokens are computed."""
        return cdiv(build_layout(self.config).need(num_tokens), self.parts)

    @property
    def parts(self) -> int:
        """How many of the cascade's own blocks lie in a block."""
        return self.block_size // self.config.block_size

    @property
    def prefix_cacheable(self) -> bool:
        """True: so look-ups ask the manager, which vetoes what other layers' caches hit."""
        return True

    @property
    def uses_slot_mapping(self) -> bool:
        """False: a token's slot depends on its place, which the worker finds from the layout."""
        return False

    @property
    def block_table_token_alignment(self) -> int | None:
        """None: a row is as wide as a request needs, without rounding up."""
        return None

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Count the bytes that the longest request of `vllm_config` holds in a layer."""
        return self.need(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Give the width of a request's row in the worker's block table.

        A row never holds more than `max_blocks`. But model runner V1 computes slots from token
        indices all the same, and would read past the end of such a row. Runner V2 does not, but its
        warm-up gives a request a block for every `block_size` tokens of a batch.

        Args:
            vllm_config: vLLM's complete configuration.
            max_len: Tokens of the longest request.

        Returns:
            Blocks.
        """
        if not vllm_config.use_v2_model_runner:
            return cdiv(max_len, self.block_size)
        batch = vllm_config.scheduler_config.max_num_batched_tokens
        return max(self.max_blocks, cdiv(batch, self.block_size) + 1)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all specs are CASCADE's: no other spec can share their group and manager."""
        return all(isinstance(spec, CascadeSpec) for spec in kv_cache_specs.values())


def _tail_bytes(spec: AttentionSpec, config: CascadeConfig) -> int:
    """Bytes of a page behind its keys and values."""
    slots = spec.num_kv_heads * spec.block_size
    return slots * (SCORE_BYTES * config.needs_scores + TRACE_BYTES * config.trace_tokens)
