"""A tiny config.json of each text architecture of vLLM, for docs/models.md."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from e2e.tiny import SMALL
from e2e.tiny_states import MAMBA2

KINDS = ["sliding_attention", "full_attention"] * 2
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
}
# By part of an architecture's name: it has experts.
WITH_EXPERTS = re.compile(
    r"M[oO][eE]|Mixtral|Deepseek|GptOss|MiniMax|HYV3|K2Horizon|FlexOlmo|Mellum|MiMoV2|Laguna"
    r"|Longcat|Afmoe|AXK1|Olmoe|Jamba|Dbrx|MistralLarge|Qwen3Next|Qwen4Exp|Glm5Next|Sarvam"
)
MIXED = {"sliding_window": 512, "layer_types": KINDS}
WIDER = {
    **SMALL,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "torch_dtype": "float32",
}
ABSENT = object()
BAILING = {
    "embedding_dropout": 0.0,
    "use_bias": False,
    "use_qkv_bias": False,
    "moe_shared_expert_intermediate_size": 64,
}
CHATGLM = {
    "model_type": "chatglm",
    "num_layers": 2,
    "num_hidden_layers": ABSENT,
    "padded_vocab_size": 256,
    "ffn_hidden_size": 256,
    "kv_channels": 32,
    "seq_length": 4096,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "original_rope": True,
    "tie_word_embeddings": False,
}
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
LFM2 = {
    "layer_types": ["conv", "full_attention"] * 2,
    "conv_L_cache": 3,
    "conv_dim": 128,
    "block_dim": 128,
    "block_ff_dim": 256,
    "block_multiple_of": 32,
    "block_auto_adjust_ff_dim": False,
    "head_dim": ABSENT,
}
NEMOTRON_H = {
    "hybrid_override_pattern": "M*M*",
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "ssm_state_size": 64,
    "conv_kernel": 4,
    "chunk_size": 64,
    "expand": 2,
}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
INDEXED_MLA = {**MLA, "index_topk": 64, "index_n_heads": 4, "index_head_dim": 32}
MIMO_V2 = {
    "hybrid_layer_pattern": [0, 1, 0, 1],
    "moe_layer_freq": [0, 1, 1, 1],
    "sliding_window": 512,
    "v_head_dim": 16,
}
# Architecture -> what its config.json has beside `WIDER` and, where it has some, `EXPERTS`.
FIELDS: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {
        **MIXED,
        "score_func": "sigmoid",
        "route_norm": True,
        "route_scale": 1.0,
        "mup_enabled": False,
        "n_group": 1,
        "topk_group": 1,
        "num_dense_layers": 1,
    },
    "BailingMoeForCausalLM": BAILING,
    "BailingMoeV2ForCausalLM": BAILING,
    "BailingMoeV3ForCausalLM": {
        **BAILING,
        **MLA,
        "layer_group_size": 2,
        "short_conv_kernel_size": 4,
        "no_kda_lora": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "ChatGLMForConditionalGeneration": CHATGLM,
    "ChatGLMModel": CHATGLM,
    "Cohere2ForCausalLM": MIXED,
    "Cohere2MoeForCausalLM": MIXED,
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "DeepseekV32ForCausalLM": {"model_type": "deepseek_v32", **INDEXED_MLA},
    "DeepseekV4ForCausalLM": {**INDEXED_MLA, "hc_eps": 1e-6, "hc_mult": 2, "rms_norm_eps": 1e-5},
    "Exaone4ForCausalLM": MIXED,
    "ExaoneForCausalLM": {"activation_function": "silu", "layer_norm_epsilon": 1e-5},
    "ExaoneMoEForCausalLM": {"model_type": "exaone_moe"},
    "FalconForCausalLM": {"head_dim": ABSENT},
    "Gemma2ForCausalLM": MIXED,
    "Gemma3ForCausalLM": MIXED,
    "Gemma3nForCausalLM": MIXED,
    "Gemma4ForCausalLM": MIXED,
    "Glm5NextForCausalLM": {
        **MLA,
        "index_topk": None,
        "layer_types": None,
        "mlp_layer_types": ["dense"] * 4,
        "mla_use_nope": True,
        "mhc": False,
        "swiglu_limit": None,
    },
    "GPTJForCausalLM": {"n_embd": 128, "n_head": 4, "n_layer": 2, "rotary_dim": 16},
    "GPTNeoXForCausalLM": {"num_key_value_heads": ABSENT},
    "HCXVisionV2ForCausalLM": {
        "model_type": "hyperclovax_vision_v2",
        "text_config": {**WIDER, "model_type": "hyperclovax"},
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
        },
    },
    "HYV3ForCausalLM": {"expert_hidden_dim": 64, "route_norm": True},
    "FalconH1ForCausalLM": {**MAMBA2, "mamba_d_ssm": 256},
    "GraniteMoeHybridForCausalLM": {
        **MAMBA2,
        "layer_types": ["mamba", "attention"] * 2,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 64,
    },
    "InklingForConditionalGeneration": {
        **dict.fromkeys(WIDER, ABSENT),
        "model_type": "inkling_mm_model",
        "text_config": {**WIDER, **EXPERTS},
    },
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "K2HorizonForCausalLM": {
        "decoder_sparse_step": 1,
        "moe_gate_bias": False,
        "layernorm_num_groups": 1,
        "query_key_norm": True,
        "router_score_func": "sigmoid",
        "router_scaling_factor": 1.0,
        "rope_head_dim": 32,
        "attention_gate_func": None,
        "mova_num_experts": 0,
        "mova_num_experts_per_tok": 1,
    },
    "KimiLinearForCausalLM": {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16},
    "Lfm2ForCausalLM": LFM2,
    "Lfm2MoeForCausalLM": {**LFM2, "num_dense_layers": 1},
    "Llama4ForCausalLM": {
        "model_type": "llama4_text",
        "intermediate_size_mlp": 256,
        "num_local_experts": 4,
    },
    "NemotronHForCausalLM": NEMOTRON_H,
    "NemotronHPuzzleForCausalLM": {"model_type": "nemotron_h", **NEMOTRON_H},
    "OlmoHybridForCausalLM": GATED_DELTA,
    "Qwen3_5ForCausalLM": {"model_type": "qwen3_5_text", **GATED_DELTA},
    "Qwen3_5MoeForCausalLM": {
        "model_type": "qwen3_5_moe_text",
        **GATED_DELTA,
        **EXPERTS,
        "shared_expert_intermediate_size": 64,
    },
    "Qwen3NextForCausalLM": {
        **GATED_DELTA,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [],
    },
    "LongcatFlashNgramForCausalLM": {"model_type": "longcat_flash"},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MellumForCausalLM": MIXED,
    "MiMoV2FlashForCausalLM": MIMO_V2,
    "MiMoV2ForCausalLM": MIMO_V2,
    "MiniCPMForCausalLM": {"dim_model_base": 128, "scale_emb": 1, "scale_depth": 1.4},
    "MiniMaxM2ForCausalLM": {"rotary_dim": 16, "scoring_func": "sigmoid"},
    "MiniMaxM3SparseForCausalLM": {
        # vLLM has its experts on GPUs alone.
        "moe_layer_freq": [0] * 4,
        "dense_intermediate_size": 64,
        "hidden_act": "swigluoai",
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.7,
        "swiglu_beta": 1.0,
        "sparse_attention_config": {
            "sparse_attention_freq": [0, 1] * 2,
            "sparse_num_index_heads": 2,
            "sparse_index_dim": 32,
            "sparse_topk_blocks": 4,
            "sparse_block_size": 64,
        },
    },
    "MistralForCausalLM": {"sliding_window": None},
    "MistralLarge3ForCausalLM": {"model_type": "deepseek_v3"},
    "MuseGlimmerForCausalLM": {
        "model_type": "muse_glimmer_text",
        "no_rope_layers": [1, 0] * 2,
        **MIXED,
    },
    "Olmo3ForCausalLM": MIXED,
    "PanguProMoEV2ForCausalLM": {"v_channels": 16},
    "PanguUltraMoEForCausalLM": {**MLA, "routed_scaling_factor": 1.0},
    "Param2MoEForCausalLM": {"moe_shared_expert_intermediate_size": 64},
    "Plamo3ForCausalLM": {
        **MIXED,
        "interleaved_sliding_window": [512, None] * 2,
        "rope_local_theta": 1e4,
    },
    # Without an indexer, which its checkpoints have, it would be served.
    "Qwen4ExpForCausalLM": {
        "model_type": "qwen4_exp_text",
        **GATED_DELTA,
        "shared_expert_intermediate_size": 64,
        "output_gate_type": "sigmoid",
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 256,
        "indexer_compress_ratio": 4,
    },
    "Rnj1ForCausalLM": {
        "sliding_window": 512,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": None,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("chunked_attention", "full_attention")
        },
    },
    "SarvamMLAForCausalLM": MLA,
    "SarvamMoEForCausalLM": BAILING,
    "SolarForCausalLM": {f"bskcn_{part}": [0] for part in (1, 2)}
    | {f"bskcn_{part}": [1] for part in (3, 4)}
    | {"bskcn_tv": [0.9, 0.8]},
    "Step3TextForCausalLM": {
        "max_position_embedding": 4096,
        "share_q_dim": 128,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 64,
        "moe_intermediate_size": 64,
        "norm_expert_weight": True,
    },
    "Step3p5ForCausalLM": {
        "model_type": "step3p5",
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 64,
        "num_attention_groups": 2,
        "rope_theta": 1e4,
        **MIXED,
    },
    "TeleChat2ForCausalLM": {
        "n_layer": 4,
        "n_head": 4,
        "ffn_hidden_size": 256,
        "layer_norm_epsilon": 1e-5,
    },
    "TeleFLMForCausalLM": {"use_mup": False, "output_mult": 1.0, "mup_scale_factor": 1.0},
    "VaultGemmaForCausalLM": MIXED,
    "Zamba2ForCausalLM": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 256,
        "attention_head_dim": 64,
        "n_mamba_heads": 8,
        "mamba_d_state": 16,
    },
}
# What a configuration class that comes with the model has, and config.json's own class has not.
BLOCK = SimpleNamespace(
    attention=SimpleNamespace(no_op=False, n_heads_in_group=2),
    ffn=SimpleNamespace(no_op=False, ffn_mult=1.0),
)
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "DeciLMForCausalLM": {"block_configs": [BLOCK] * 4},
    "MiniMaxM3SparseForCausalLM": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "Param2MoEForCausalLM": {"rope_theta": 1e4, "rope_scaling": None},
}
# With prefix caching, its default, vLLM itself does not come as far as the model on a CPU.
OPTIONS: dict[str, dict[str, Any]] = {"KimiLinearForCausalLM": {"enable_prefix_caching": False}}


def config_of(name: str) -> dict[str, Any]:
    """A tiny config.json of an architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types: dict[str, str] = {}
    for model_type, classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for each in [classes] if isinstance(classes, str) else classes:
            types.setdefault(each, model_type)
    experts = EXPERTS if WITH_EXPERTS.search(name) else {}
    known = {"architectures": [name], "model_type": types.get(name, "llama")}
    config = WIDER | experts | known | FIELDS.get(name, {})
    return {field: value for field, value in config.items() if value is not ABSENT}
