"""Models that run fast: random ones of a few thousand weights, and a real one's first layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reference.llama import random_tensors

# A small cascade that random models of 1,024 positions run many times over.
CASCADE = {
    "cache_tokens": 128,
    "num_sub_caches": 4,
    "newest_share": 0.0,
    "num_sink_tokens": 16,
    "stride": 64,
    "selection_window": 64,
}
# The same budget in levels.
ELASTIC = CASCADE | {"structure": "elastic", "num_sub_caches": "auto"}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# Of other architectures; head size and blocks are such that vLLM's own CPU backend takes them too.
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def by_policy(policy: str, cascade: dict[str, Any]) -> dict[str, Any]:
    """A cascade's options by another policy.

    Args:
        policy: Its name; `paper` compares pairs and has the window that it presets, `distinct`
            has levels.
        cascade: The options, with a window that their stride allows.
    """
    own: dict[str, dict[str, Any]] = {
        "paper": {"selection_window": None},
        "distinct": {"structure": "elastic", "num_sub_caches": "auto"},
    }
    return {**cascade, "policy": policy} | own.get(policy, {})


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> str:
    """Write a random Llama to `folder`.

    Args:
        folder: Where to; made if missing.
        seed: Of the weights.
        changes: Fields of config.json that differ from `LLAMA`.

    Returns:
        The folder, for vLLM's `model`.
    """
    config = {**LLAMA, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: t.float().contiguous() for name, t in random_tensors(config, seed).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def save_first_layers(folder: Path, model: str, num_layers: int) -> str:
    """Write the first layers of a saved Llama to `folder`, with its tokenizer.

    Args:
        folder: Where to; made if missing.
        model: Folder of the whole model.
        num_layers: How many of its layers.

    Returns:
        The folder, for vLLM's `model`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(model).iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((Path(model) / "config.json").read_text())
    config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config))
    layer_of = re.compile(r"model\.layers\.(\d+)\.")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not (found := layer_of.match(name)) or int(found[1]) < num_layers
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    """Token ids of a prompt that repeats itself now and then, as text does."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 256, (num_tokens,), generator=generator).tolist()


def prompt_without_ties(
    num_tokens: int, seed: int, neighbours: int = 64, vocab_size: int = 256
) -> list[int]:
    """Token ids of a prompt in which no token stands twice among so many neighbours.

    In the first layer equal tokens have equal keys. Which of two is kept is then settled by how
    their keys were rounded, and batches and ranks of other shapes round otherwise.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        token = int(torch.randint(2, vocab_size, (), generator=generator))
        if token not in tokens[-neighbours:]:
            tokens.append(token)
    return tokens


def save_random(folder: Path, model_type: str, seed: int = 0, **changes: Any) -> str:
    """Write a random model of any architecture that transformers has to `folder`.

    Args:
        folder: Where to; made if missing.
        model_type: Of the configuration, as in config.json.
        seed: Of the weights.
        changes: Fields of the configuration beside `SMALL`.

    Returns:
        The folder, for vLLM's `model`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if name.endswith("sinks"):
            tensor.data = 2 * torch.randn(tensor.shape, generator=generator)
        elif "norm" in name:
            # Ones commute with a rotation, and would hide a norm that comes after it.
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            # Outputs about as large as inputs, so that every layer has its say in the logits.
            scale = tensor.shape[-1] ** -0.5
            tensor.data = torch.randn(tensor.shape, generator=generator) * scale
    model.save_pretrained(folder)
    return str(folder)


def save_gpt_oss(folder: Path, **changes: Any) -> str:
    """Write a random gpt-oss, every other layer with a window, all with sink logits.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    kinds = ["sliding_attention", "full_attention"] * 3
    fields = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 64,
        "layer_types": kinds[: changes.get("num_hidden_layers", 3)],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    }
    return save_random(folder, "gpt_oss", **{**fields, **changes})


def save_gemma4(folder: Path, **changes: Any) -> str:
    """Write a random Gemma 4 of two full-attention layers among three with a window.

    As in the real model, heads have 256 channels in a layer with a window and 512 in one without.
    There are twice as many query heads of a KV head there, and values are keys before their norm.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    kinds = ["sliding_attention", "full_attention", "sliding_attention"] * 2
    fields = {
        "num_hidden_layers": 5,
        "layer_types": kinds[:5],
        "sliding_window": 64,
        "num_global_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        # Neither a second embedding for each layer, nor layers that share keys and values.
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }
    save_random(folder, "gemma4_text", **{**fields, **changes})
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if name.endswith("q_norm.weight"):
            # Logits are not scaled by anything else: a random one would be too sharp to compare.
            tensor *= 0.2
    save_file(tensors, weights, metadata={"format": "pt"})
    return str(folder)


def save_gemma3(folder: Path, **changes: Any) -> str:
    """Write a random Gemma 3 of two full-attention layers among three with a window.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    kinds = ["sliding_attention", "full_attention", "sliding_attention"] * 2
    fields = {
        "num_hidden_layers": 5,
        "layer_types": kinds[:5],
        "sliding_window": 64,
        # Sharper attention than a random model's own, so that a wrong rotation shows.
        "query_pre_attn_scalar": 4,
    }
    return save_random(folder, "gemma3_text", **{**fields, **changes})


def save_gemma2(folder: Path, **changes: Any) -> str:
    """Write a random Gemma 2, every other layer with a window, all with a soft cap on logits.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    fields = {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        "sliding_window": 64,
        # Logits as sharp as a trained model's, of which the cap leaves little.
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 2.0,
    }
    return save_random(folder, "gemma2", **{**fields, **changes})


def save_llama4(folder: Path, **changes: Any) -> str:
    """Write a random Llama 4: chunked attention before each of two layers that rotate nothing.

    The latter have experts, of which a token gets one.

    Args:
        folder: Where to; made if missing.
        changes: Fields of its configuration that differ.

    Returns:
        The folder, for vLLM's `model`.
    """
    fields = {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0] * 2,
        "attention_chunk_size": 64,
        "intermediate_size_mlp": 128,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "rope_theta": 10_000.0,
    }
    return save_random(folder, "llama4_text", **{**fields, **changes})
