"""Random models of a few thousand weights, saved as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from reference.llama import random_tensors

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


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    """Token ids of a prompt that repeats itself now and then, as text does."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 256, (num_tokens,), generator=generator).tolist()
