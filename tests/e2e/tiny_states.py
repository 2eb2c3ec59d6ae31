"""Random models of layers with a state beside full-attention layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from e2e.tiny import save_random

MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}
GATED_DELTA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def save_lfm2(folder: Path, **changes: Any) -> str:
    """Write a random LFM2, a convolution before each of two full-attention layers.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    fields = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention"] * 2,
        "conv_L_cache": 3,
        "conv_dim": 128,
        "block_dim": 128,
        "block_ff_dim": 128,
        "block_auto_adjust_ff_dim": False,
        "rope_theta": 10_000.0,
    }
    return save_random(folder, "lfm2", **{**fields, **changes})


def save_nemotron_h(folder: Path, **changes: Any) -> str:
    """Write a random Nemotron-H: Mamba-2, attention without positions, Mamba-2, attention.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    fields = {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention"] * 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "ssm_state_size": 64,
        "conv_kernel": 4,
        "chunk_size": 64,
        "expand": 4,
    }
    return save_random(folder, "nemotron_h", **{**fields, **changes})


def save_qwen3_5(folder: Path, **changes: Any) -> str:
    """Write a random Qwen3.5 without experts: gated delta nets before full-attention layers.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    return save_random(folder, "qwen3_5_text", **{**GATED_DELTA, **changes})


def save_falcon_h1(folder: Path, **changes: Any) -> str:
    """Write a random Falcon-H1, whose layers have Mamba-2 and full attention side by side.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    fields = {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "mamba_d_ssm": 256,
        **MAMBA2,
    }
    return save_random(folder, "falcon_h1", **{**fields, **changes})


def save_qwen3_next(folder: Path, **changes: Any) -> str:
    """Write a random Qwen3-Next: gated delta nets before each of two full-attention layers.

    All experts take part, because rounding a router's logits would choose others of fewer.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    fields = {
        **GATED_DELTA,
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return save_random(folder, "qwen3_next", **{**fields, **changes})


def save_granite_hybrid(folder: Path, **changes: Any) -> str:
    """Write a random Granite 4: Mamba-2 before each of two full-attention layers, all with experts.

    As in the real models those rotate nothing, and all experts take part as in Qwen3-Next.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    fields = {
        **MAMBA2,
        "mamba_n_heads": 16,
        "hidden_size": 256,
        "head_dim": 64,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention"] * 2,
        "position_embedding_type": "nope",
        "attention_multiplier": 0.2,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "shared_intermediate_size": 64,
    }
    return save_random(folder, "granitemoehybrid", **{**fields, **changes})


def save_jamba(folder: Path, **changes: Any) -> str:
    """Write a random Jamba: Mamba before each of two full-attention layers, which have experts.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    fields = {
        "hidden_size": 256,
        "head_dim": 64,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 8,
        "num_experts": 4,
        "num_experts_per_tok": 4,
    }
    return save_random(folder, "jamba", **{**fields, **changes})


def save_olmo_hybrid(folder: Path, **changes: Any) -> str:
    """Write a random OLMo-Hybrid: gated delta nets before each of two full-attention layers.

    As transformers writes it, it is in the folder `transformers`.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    fields = {
        **GATED_DELTA,
        "hidden_size": 256,
        "head_dim": 64,
        # Its values are twice as wide as its keys.
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 96,
        "linear_value_head_dim": 192,
    }
    fields |= changes
    own = folder / "transformers"
    save_random(own, "olmo_hybrid", **fields)
    # Versions of transformers name two norms otherwise, and cut the convolution otherwise or not.
    tensors: dict[str, torch.Tensor] = {}
    convolutions: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in load_file(own / "model.safetensors").items():
        if "conv1d" in name:
            layer, _, part = name.partition("linear_attn.")
            convolutions.setdefault(layer, {})["qkvc".index(part[0])] = tensor
        else:
            name = name.replace("attention_layer_norm", "input_layernorm")
            tensors[name.replace("feedforward_layer_norm", "post_attention_layernorm")] = tensor
    keys = fields["linear_num_key_heads"] * fields["linear_key_head_dim"]
    values = fields["linear_num_value_heads"] * fields["linear_value_head_dim"]
    for layer, parts in convolutions.items():
        whole = torch.cat([parts[number] for number in sorted(parts)])
        for part, tensor in zip("qkv", whole.split([keys, keys, values]), strict=True):
            tensors[f"{layer}linear_attn.{part}_conv1d.weight"] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((own / "config.json").read_text())
    return str(folder)
