"""Writes docs/models.md's table: of each text architecture of vLLM, whether CASCADE serves it.

Each is built with a tiny config.json and random weights, through the checks that a server runs.

    python benchmarks report.models docs/models.md  # `make models`
    python benchmarks report.models ARCHITECTURE...
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from e2e.tiny import SMALL
from report.absent import stood_in

OUTCOMES = SERVED, REFUSED, NOT_BUILT = "served", "refused", "not built"
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
    r"|Longcat|Afmoe|AXK1|Olmoe|Jamba|Dbrx|MistralLarge|Qwen3Next"
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
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
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
    "ChatGLMForConditionalGeneration": CHATGLM,
    "ChatGLMModel": CHATGLM,
    "Cohere2ForCausalLM": MIXED,
    "Cohere2MoeForCausalLM": MIXED,
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "Exaone4ForCausalLM": MIXED,
    "ExaoneForCausalLM": {"activation_function": "silu", "layer_norm_epsilon": 1e-5},
    "ExaoneMoEForCausalLM": {"model_type": "exaone_moe"},
    "FalconForCausalLM": {"head_dim": ABSENT},
    "Gemma3ForCausalLM": MIXED,
    "Gemma3nForCausalLM": MIXED,
    "Gemma4ForCausalLM": MIXED,
    "GPTJForCausalLM": {"n_embd": 128, "n_head": 4, "n_layer": 2, "rotary_dim": 16},
    "GPTNeoXForCausalLM": {"num_key_value_heads": ABSENT},
    "HYV3ForCausalLM": {"expert_hidden_dim": 64, "route_norm": True},
    "FalconH1ForCausalLM": {**MAMBA2, "mamba_d_ssm": 256},
    "GraniteMoeHybridForCausalLM": {
        **MAMBA2,
        "layer_types": ["mamba", "attention"] * 2,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 64,
    },
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "KimiLinearForCausalLM": {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16},
    "Lfm2ForCausalLM": LFM2,
    "Lfm2MoeForCausalLM": {**LFM2, "num_dense_layers": 1},
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
    "MistralForCausalLM": {"sliding_window": None},
    "MistralLarge3ForCausalLM": {"model_type": "deepseek_v3"},
    "Olmo3ForCausalLM": MIXED,
    "PanguProMoEV2ForCausalLM": {"v_channels": 16},
    "Param2MoEForCausalLM": {"moe_shared_expert_intermediate_size": 64},
    "Plamo3ForCausalLM": {
        **MIXED,
        "interleaved_sliding_window": [512, None] * 2,
        "rope_local_theta": 1e4,
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
    "Param2MoEForCausalLM": {"rope_theta": 1e4, "rope_scaling": None},
}


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of an architecture.

    Args:
        architecture: As in config.json.
        outcome: `SERVED`, `REFUSED`, or `NOT_BUILT` where it cannot be tried.
        why: What CASCADE serves of it, or why not.
    """

    architecture: str
    outcome: str
    why: str


def architectures() -> list[str]:
    """The text models of vLLM's registry, those without a class of vLLM's own at the end."""
    from vllm.model_executor.models import registry

    own = list(registry._TEXT_GENERATION_MODELS)
    others = registry._TRANSFORMERS_SUPPORTED_MODELS
    return own + [name for name, (_, kind) in others.items() if "MultiModal" not in kind]


def survey(names: list[str]) -> Iterator[Row]:
    """Build each architecture as a server would.

    Args:
        names: Architectures.

    Yields:
        A row of each.
    """
    from vllm.model_executor.models.registry import _VLLM_MODELS

    from vllm_cascade.plugin import register

    register()
    with _one_rank(), stood_in():
        for name in names:
            module, kind = _VLLM_MODELS[name]
            if not module.startswith("vllm."):
                module = f"vllm.model_executor.models.{module}"
            try:
                cls = getattr(importlib.import_module(module), kind)
            except ImportError as error:
                yield Row(name, NOT_BUILT, f"needs {error.name}")
                continue
            yield _tried(name, cls)


def _tried(name: str, cls: type) -> Row:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.model_executor.models.registry import ModelRegistry, _RegisteredModel

    from vllm_cascade.support.rotation import RotationError
    from vllm_cascade.support.unsupported import UnsupportedError

    # vLLM asks another process for each that it does not know, which imports vLLM for that.
    known = ModelRegistry.models | {name: _RegisteredModel.from_model_cls(cls)}
    with (
        unittest.mock.patch.object(ModelRegistry, "models", known),
        tempfile.TemporaryDirectory() as folder,
    ):
        (Path(folder) / "config.json").write_text(json.dumps(config_of(name)))
        try:
            vllm_config = EngineArgs(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                attention_backend="CASCADE",
                enforce_eager=True,
                dtype="float32",
                max_model_len=2048,
                hf_overrides=ATTRIBUTES.get(name, {}),
            ).create_engine_config()
            return Row(name, SERVED, _served(get_model(vllm_config=vllm_config)))
        except (UnsupportedError, RotationError) as error:
            return Row(name, REFUSED, _reason(str(error)))
        except Exception as error:
            if "not supported by backend CASCADE" in str(error):
                return Row(name, REFUSED, f"`{str(error).partition(' is not supported')[0]}`")
            absent = re.search(r"Config' object has no attribute '(\w+)'", str(error))
            why = f"needs `{absent[1]}` in config.json" if absent else "vLLM refuses it on a CPU"
            return Row(name, NOT_BUILT, why)


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


def _served(model: Any) -> str:
    """How many of the layers are CASCADE's, and what is particular of them."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = [each for each in model.modules() if isinstance(each, AttentionLayerBase)]
    ours = [each.impl for each in layers if each.get_attn_backend().get_name() == "CASCADE"]
    still = sum(not impl.worker.rotary.sin.any() for impl in ours)
    said = ["all layers" if len(ours) == len(layers) else "full-attention layers"]
    if still:
        said.append("none rotated" if still == len(ours) else "some not rotated")
    return ", ".join(said)


def _reason(message: str) -> str:
    """What stands in a refusal between "cannot serve" and what to do instead."""
    message = re.sub(r"^CASCADE cannot serve (this model: )?", "", message)
    if message.startswith("layer "):
        return re.sub(r"^layer \S+ ", "it ", message).split(". CASCADE")[0]
    asked, _, why = message.partition(": ")
    asks_nothing = asked.startswith(("this model", "attention layers"))
    return why.partition(". ")[0] if asks_nothing else asked


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """Process groups of one rank, and what else a worker sets up before it builds a model."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.utils.network_utils import get_open_port

    replaced = unittest.mock.patch.object
    # Twice a model, each half a second after all that vLLM imports.
    with (
        replaced(gc, "collect", lambda *_: 0),
        replaced(torch.accelerator, "empty_cache", lambda: None),
    ):
        with set_current_vllm_config(VllmConfig()):
            address = f"tcp://127.0.0.1:{get_open_port()}"
            init_distributed_environment(1, 0, address, 0, "gloo")
            initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def table(rows: list[Row]) -> str:
    """Counts in one line, and a table in Markdown."""
    counts = [f"{sum(row.outcome == each for row in rows)} {each}" for each in OUTCOMES]
    lines = [f"{len(rows)} architectures: {', '.join(counts)}.", ""]
    lines += ["| architecture | | |", "| --- | --- | --- |"]
    lines += [f"| `{row.architecture}` | {row.outcome} | {row.why} |" for row in rows]
    return "\n".join(lines) + "\n"


def rewritten(text: str, rows: list[Row]) -> str:
    """A page with the table of `rows` between its markers, `<!-- models -->`."""
    pattern = r"(<!-- models -->\n).*(<!-- /models -->\n)"
    return re.sub(pattern, lambda found: found[1] + table(rows) + found[2], text, flags=re.S)


def main() -> int:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    path = Path(sys.argv[1]) if sys.argv[1:2] and sys.argv[1].endswith(".md") else None
    rows = []
    for row in survey(architectures() if path else sys.argv[1:] or architectures()):
        print(f"{row.architecture:36} {row.outcome:10} {row.why}", flush=True)
        rows.append(row)
    if path:
        path.write_text(rewritten(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
