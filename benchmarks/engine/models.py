"""The models that engines run: shapes of Llama-3.1, and a tiny one for a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_cascade.commands.plan import Plan

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 1 << 20,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Llama-3.1-70B's, of which one GPU of 141 GB does not hold the weights.
LLAMA_70B = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
TINY_LLAMA = LLAMA | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}


def plan_of(folder: Path, cascade: dict[str, Any], engine: dict[str, Any]) -> Plan:
    """What an engine will resolve the cascade's options to.

    Args:
        folder: Of the model's configuration.
        cascade: Options of the cascade.
        engine: Options of the engine.
    """
    from vllm_cascade.commands.plan import make_plan

    options = {name: engine[name] for name in ("max_model_len", "dtype")}
    return make_plan(str(folder), cascade, block_size=engine.get("block_size"), **options)
