"""What the plugin relies on in vLLM beside what its patches replace and its modules import.

`needs.py` reads from the plugin's own source which names a module imports from vLLM, and which
attributes it looks up on them. Such names are not repeated here.
"""

from __future__ import annotations

# Class of the plugin -> members of vLLM's base class that it replaces. If a member is a function,
# its parameters have to fit too.
OVERRIDES: dict[str, tuple[str, ...]] = {
    "vllm_cascade/attention/backend.py:CascadeBackend": (
        "forward_includes_kv_cache_update",
        "supported_dtypes",
        "supported_kv_cache_dtypes",
        "get_name",
        "get_impl_cls",
        "get_builder_cls",
        "get_supported_kernel_block_sizes",
        "supported_kv_cache_layouts",
        "supports_sink",
        "supports_per_head_quant_scales",
        "supports_kv_connector",
        "customize_spec",
    ),
    "vllm_cascade/attention/builder.py:CascadeMetadataBuilder": (
        "_cudagraph_support",
        "supports_draft_decode_metadata_update",
        "__init__",
        "build",
        "build_for_drafting",
        "update_draft_decode_metadata",
    ),
    "vllm_cascade/attention/impl.py:CascadeImpl": ("__init__", "forward"),
    "vllm_cascade/kv_cache/manager.py:CascadeManager": (
        "__init__",
        "get_num_blocks_to_allocate",
        "allocate_new_blocks",
        "allocate_external_computed_blocks",
        "add_local_computed_blocks",
        "cache_blocks",
        "take_pending_cow_copies",
        "free",
        "pop_blocks_for_free",
    ),
    "vllm_cascade/metrics.py:CascadeStatLogger": ("__init__", "record", "log_engine_initialized"),
    "vllm_cascade/kv_cache/spec.py:CascadeSpec": (
        "__post_init__",
        "prefix_cacheable",
        "uses_slot_mapping",
        "block_table_token_alignment",
        "max_memory_usage_bytes",
        "max_num_blocks_per_req",
        "is_uniform_with_collection",
    ),
}

# File of the plugin -> class of vLLM, of which the file gets objects -> the members that it reads.
MEMBERS: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm_cascade/attention/builder.py": {
        "vllm.v1.attention.backend.CommonAttentionMetadata": (
            "num_reqs",
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "block_table_tensor",
            "max_query_len",
        ),
        "vllm.config.CompilationConfig": ("static_forward_context",),
        "vllm.config.SchedulerConfig": ("max_num_seqs",),
        "vllm.config.VllmConfig": ("num_speculative_tokens", "speculative_config"),
        "vllm.config.SpeculativeConfig": ("method",),
        "vllm.model_executor.layers.attention.Attention": ("impl", "is_draft_layer"),
    },
    "vllm_cascade/attention/impl.py": {
        "vllm.config.SchedulerConfig": ("max_num_seqs", "max_num_batched_tokens"),
        "vllm.config.VllmConfig": ("num_speculative_tokens",),
        "vllm.config.ModelConfig": ("dtype",),
    },
    "vllm_cascade/kv_cache/manager.py": {
        "vllm.v1.core.single_type_kv_cache_manager.CircularBufferManager": (
            "block_pool",
            "block_size",
            "req_to_blocks",
            "kv_cache_group_id",
            "_pending_cow_copies",
        ),
        "vllm.v1.core.block_pool.BlockPool": (
            "free_blocks",
            "get_new_blocks",
            "get_num_free_blocks",
        ),
        "vllm.v1.request.Request": ("request_id", "num_tokens"),
    },
    "vllm_cascade/kv_cache/continuation.py": {
        "vllm.v1.request.Request": (
            "is_finished",
            "num_computed_tokens",
            "num_prompt_tokens",
            "num_tokens",
        ),
        "vllm.v1.core.kv_cache_utils.KVCacheBlock": ("block_id", "ref_cnt"),
    },
    "vllm_cascade/kv_cache/prefix.py": {
        "vllm.v1.core.block_pool.BlockPool": (
            "cache_full_blocks",
            "emit_cached_block_events",
            "evict_blocks",
            "get_cached_block",
            "get_new_blocks",
            "move_block_hashes",
            "touch",
        ),
        "vllm.v1.request.Request": (
            "block_hashes",
            "max_tokens",
            "num_computed_tokens",
            "num_prompt_tokens",
            "resumable",
        ),
        "vllm.v1.core.kv_cache_utils.KVCacheBlock": ("block_id", "block_hash"),
    },
    "vllm_cascade/kv_cache/ends.py": {
        "vllm.v1.request.Request": (
            "all_token_ids",
            "block_hashes",
            "mm_features",
            "num_computed_tokens",
            "num_prompt_tokens",
            "num_tokens",
            "prompt_embeds",
        ),
        "vllm.v1.core.kv_cache_utils.KVCacheBlock": ("ref_cnt", "set_block_hash", "reset_hash"),
    },
    "patches/continued_requests.py": {
        "vllm.v1.core.kv_cache_manager.KVCacheManager": (
            "coordinator",
            "create_kv_cache_blocks",
            "prefix_cache_lookup_enabled",
        ),
        "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": ("single_type_managers",),
    },
    "vllm_cascade/support/exact.py": {
        "vllm.v1.engine.EngineCoreRequest": (
            "prompt_embeds",
            "prompt_token_ids",
            "resumable",
            "sampling_params",
        ),
        "vllm.sampling_params.SamplingParams": ("extra_args", "max_tokens"),
    },
    "patches/evicted_tokens.py": {
        "vllm.v1.core.sched.scheduler.Scheduler": ("kv_cache_manager",),
        "vllm.v1.core.kv_cache_manager.KVCacheManager": ("coordinator",),
        "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": ("single_type_managers",),
        "vllm.v1.request.Request": ("num_prompt_tokens", "num_output_tokens"),
    },
    "patches/draft_boundaries.py": {
        "vllm.v1.core.sched.scheduler.Scheduler": (
            "kv_cache_manager",
            "need_mamba_block_aligned_split",
            "num_spec_tokens",
            "vllm_config",
        ),
        "vllm.v1.core.kv_cache_manager.KVCacheManager": ("coordinator",),
        "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": ("single_type_managers",),
        "vllm.v1.request.Request": (
            "num_computed_tokens",
            "num_output_placeholders",
            "num_tokens",
        ),
    },
    "patches/late_drafts.py": {
        "vllm.config.VllmConfig": (
            "attention_config",
            "device_config",
            "speculative_config",
            "use_v2_model_runner",
        ),
        "vllm.v1.worker.gpu.input_batch.InputBatch": (
            "expanded_local_pos",
            "logits_indices",
            "positions",
        ),
    },
    "patches/taken_back_tokens.py": {
        "vllm.v1.core.sched.scheduler.Scheduler": ("kv_cache_manager", "_free_request_blocks"),
        "vllm.v1.core.kv_cache_manager.KVCacheManager": ("coordinator",),
        "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": ("single_type_managers",),
        "vllm.v1.request.Request": ("request_id", "num_computed_tokens", "num_tokens"),
    },
    "vllm_cascade/kv_cache/spec.py": {
        "vllm.v1.kv_cache_interface.AttentionSpec": (
            "block_size",
            "num_kv_heads",
            "head_size",
            "head_size_v",
            "dtype",
            "num_head_slots",
            "page_size_padded",
            "state_content_size_bytes",
            "page_size_bytes",
            "unpadded_page_size_bytes",
        ),
        "vllm.config.VllmConfig": ("use_v2_model_runner",),
    },
    "vllm_cascade/attention/rope.py": {
        "vllm.model_executor.layers.attention.Attention": (
            "attn_backend",
            "head_size",
            "layer_name",
        ),
        "vllm.model_executor.layers.rotary_embedding.RotaryEmbedding": (
            "cos_sin_cache",
            "is_neox_style",
            "rotary_dim",
            "_compute_cos_sin_cache",
        ),
        "vllm.model_executor.models.qwen3_next.Qwen3NextAttention": (
            "use_fused_qk_norm_rope_gate",
        ),
        "vllm.model_executor.models.llama4.Llama4Attention": (
            "attn_temperature_tuning",
            "floor_scale",
        ),
        "vllm.model_executor.layers.rotary_embedding.Phi3LongRoPEScaledRotaryEmbedding": (
            "_compute_cos_sin_cache",
            "long_factor",
            "long_mscale",
            "long_short_cos_sin_cache",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "rotary_dim",
            "short_factor",
            "short_mscale",
        ),
    },
    "vllm_cascade/attention/transformers_rope.py": {
        "vllm.model_executor.layers.attention.Attention": (
            "head_size",
            "layer_name",
            "num_heads",
            "num_kv_heads",
        ),
        "vllm.model_executor.models.transformers.base.Base": (
            "model",
            "model_config",
            "text_config",
        ),
    },
    "vllm_cascade/metrics.py": {
        "vllm.config.ModelConfig": ("served_model_name",),
        "vllm.v1.metrics.stats.IterationStats": ("finished_requests",),
        "vllm.v1.metrics.stats.FinishedRequestStats": (
            "num_prompt_tokens",
            "num_generation_tokens",
            "num_cached_tokens",
        ),
    },
    "vllm_cascade/support/selection.py": {
        "vllm.config.AttentionConfig": ("backend", "backend_per_kind", "use_non_causal"),
        "vllm.config.ModelConfig": ("is_mm_prefix_lm", "rswa_window"),
        "vllm.v1.attention.selector.AttentionSelectorConfig": (
            "head_size",
            "dtype",
            "kv_cache_dtype",
            "block_size",
            "use_mm_prefix",
            "use_non_causal",
            "use_batch_invariant",
            "use_rswa",
        ),
        "vllm.v1.attention.backend.AttentionBackend": ("validate_configuration",),
    },
    "vllm_cascade/support/resolved.py": {
        "vllm.config.VllmConfig": ("additional_config", "model_config"),
        "vllm.config.ModelConfig": (
            "disable_sliding_window",
            "get_sliding_window",
            "hf_text_config",
            "max_model_len",
            "model_arch_config",
        ),
    },
    "vllm_cascade/support/validate.py": {
        "vllm.config.VllmConfig": (
            "additional_config",
            "attention_config",
            "cache_config",
            "device_config",
            "kv_transfer_config",
            "model_config",
            "parallel_config",
        ),
        "vllm.config.ModelConfig": (
            "attn_type",
            "dtype",
            "get_head_size",
            "get_total_num_kv_heads",
            "hf_text_config",
            "is_mm_prefix_lm",
            "original_max_model_len",
            "runner_type",
            "use_mla",
            "uses_alibi",
            "multimodal_config",
            "uses_mrope",
        ),
        "vllm.config.CacheConfig": (
            "cache_dtype",
            "enable_prefix_caching",
            "kv_sharing_fast_prefill",
        ),
        "vllm.config.ParallelConfig": (
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
            "tensor_parallel_size",
        ),
    },
    "vllm_cascade/support/hybrid.py": {
        "vllm.config.ModelConfig": (
            "attention_chunk_size",
            "get_sliding_window",
            "hf_text_config",
            "max_model_len",
        ),
    },
    "vllm_cascade/support/drafts.py": {
        "vllm.config.VllmConfig": (
            "attention_config",
            "device_config",
            "model_config",
            "speculative_config",
            "use_v2_model_runner",
        ),
        "vllm.config.SpeculativeConfig": (
            "attention_backend",
            "draft_model_config",
            "method",
            "use_multi_module_mtp",
        ),
    },
    "vllm_cascade/support/states.py": {
        "vllm.config.ModelConfig": ("attn_type", "max_model_len"),
        "vllm.config.CacheConfig": (
            "block_size",
            "enable_prefix_caching",
            "mamba_block_size",
            "mamba_cache_mode",
            "user_specified_block_size",
        ),
    },
    "vllm_cascade/support/sleep.py": {
        "vllm.config.ModelConfig": ("enable_cumem_allocator",),
        "vllm.config.SpeculativeConfig": ("target_model_config",),
    },
    "vllm_cascade/commands/plan.py": {
        "vllm.config.ModelConfig": (
            "attention_chunk_size",
            "get_num_kv_heads",
            "get_num_layers",
            "get_total_num_hidden_layers",
            "verify_with_parallel_config",
        ),
    },
    "patches/chunked_layers.py": {
        "vllm.config.AttentionConfig": ("backend", "backend_per_kind"),
        "vllm.config.VllmConfig": ("attention_config",),
    },
    "patches/front_end_validation.py": {
        "vllm.engine.arg_utils.EngineArgs": ("attention_backend", "attention_config"),
    },
}

# File of the plugin -> function of vLLM that the file calls, or that calls the file -> parameters;
# or constant of vLLM -> value.
EXACTLY: dict[str, dict[str, str]] = {
    "vllm_cascade/attention/backend.py": {
        "vllm.v1.worker.utils.select_common_block_size": (
            "(kv_manager_block_size, backends, kv_cache_specs=None)"
        ),
    },
    "vllm_cascade/commands/plan.py": {
        "vllm.platforms.interface.Platform._align_hybrid_block_size": (
            "(vllm_config, backend_cls)"
        ),
    },
    "vllm_cascade/kv_cache/ends.py": {
        "vllm.v1.core.block_pool.BlockPool.get_new_blocks": "(self, num_blocks)",
        "vllm.v1.core.block_pool.BlockPool.touch": "(self, blocks)",
        "vllm.v1.core.block_pool.BlockPool.unpin_blocks": "(self, blocks, on_reuse)",
    },
    "patches/chunked_layers.py": {
        "vllm.v1.kv_cache_interface.KVCacheSpecKind.CHUNKED_LOCAL_ATTENTION": (
            "'chunked_local_attention'"
        ),
    },
    "vllm_cascade/plugin.py": {
        "vllm.v1.attention.backends.registry.register_backend": (
            "(backend, class_path=None, is_mamba=False)"
        ),
        "vllm.v1.kv_cache_spec_registry.KVCacheSpecRegistry.register": (
            "(kvcache_spec_cls, manager_class=None, uniform_type_base_spec=None)"
        ),
        "vllm.v1.worker.utils.customize_attention_spec": "(backend, spec)",
    },
    "vllm_cascade/support/sleep.py": {
        "vllm.device_allocator.cumem.CuMemAllocator.use_memory_pool": "(self, tag=None)",
    },
    "pyproject.toml": {
        "vllm.plugins.DEFAULT_PLUGINS_GROUP": "'vllm.general_plugins'",
        "vllm.plugins.PLATFORM_PLUGINS_GROUP": "'vllm.platform_plugins'",
        "vllm.plugins.STAT_LOGGER_PLUGINS_GROUP": "'vllm.stat_logger_plugins'",
    },
}
