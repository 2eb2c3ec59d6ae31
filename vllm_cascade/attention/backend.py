"""The attention backend CASCADE: what vLLM asks a backend class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import (
    AttentionBackend,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from vllm_cascade.kv_cache.spec import CascadeSpec
from vllm_cascade.structure.accounting import startup_line
from vllm_cascade.support.names import BACKEND_NAME, log_of
from vllm_cascade.support.states import BLOCK_SIZE, has_states
from vllm_cascade.support.unsupported import FP8_DTYPES

if TYPE_CHECKING:
    from vllm_cascade.attention.builder import CascadeMetadataBuilder
    from vllm_cascade.attention.impl import CascadeImpl

logger = log_of(__name__)


class CascadeBackend(AttentionBackend):
    """Paged attention over a cascade of sub-caches of bounded size."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16", *FP8_DTYPES]

    @staticmethod
    def get_name() -> str:
        """Give the name by which users select the backend."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[CascadeImpl]:
        """Give the class of a layer's forward pass, which rotates queries and keys itself."""
        from vllm_cascade.attention.impl import CascadeImpl

        return CascadeImpl

    @staticmethod
    def get_builder_cls() -> type[CascadeMetadataBuilder]:
        """Give the class that cuts each step into waves, once for all layers."""
        from vllm_cascade.attention.builder import CascadeMetadataBuilder

        return CascadeMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Give the sizes of blocks that the kernels take; vLLM divides larger blocks into such.

        Args:
            kv_cache_spec: The spec of CASCADE's layers. Without it, vLLM asks which blocks it may
                make: with states it makes them larger than what is given, and a multiple of it.

        Returns:
            The cascade's own size, or any multiple of vLLM's least.
        """
        if isinstance(kv_cache_spec, CascadeSpec):
            return [kv_cache_spec.config.block_size]
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None and has_states(vllm_config.model_config):
            return [MultipleOf(BLOCK_SIZE)]
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Give the one layout that `Pages` reads: a block's heads, slots, then channels."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        """True: a model's sink logits join the softmax. CASCADE's own sinks are tokens."""
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """True: pages in FP8 have a scale for each KV head, or one for all."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """False: a block holds what survived, which a connector cannot find by hash."""
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Turn vLLM's spec of a layer into the cascade's, for the model loaded last.

        Args:
            spec: vLLM's spec of the layer.

        Returns:
            The spec with the model's resolved configuration.

        Raises:
            ConfigError: The configuration does not fit the spec's block size.
        """
        from vllm_cascade.attention.impl import CascadeImpl

        config, vllm_config = CascadeImpl.resolve_config(), CascadeImpl._vllm_config
        in_heads = has_states(vllm_config.model_config)
        cascade_spec = CascadeSpec.of(spec, config, tail_in_heads=in_heads)
        if cascade_spec.is_of_a_token:
            return cascade_spec
        layers = vllm_config.compilation_config.static_forward_context.values()
        logger.info_once(
            "%s",
            startup_line(
                config,
                cascade_spec.max_blocks,
                cascade_spec.page_size_bytes,
                sum(isinstance(getattr(layer, "impl", None), CascadeImpl) for layer in layers),
            ),
            # Every rank logs the line, not only the first of each host: so the log shows where
            # CASCADE is active.
            scope="process",
        )
        return cascade_spec
