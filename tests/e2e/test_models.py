"""Finds alone: a kind of rotation that is taken over wrongly, in a model that is served.

Random models: under the budget against vLLM's own attention, and beyond the reach against the
whole-model oracle, which knows Llama and is given each layer's table.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import ModelRegistry
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llama import LlamaForCausalLM

from e2e.oracle import check_past_reach
from e2e.support import engine, impls_of
from e2e.test_hybrid import CASCADE, Answer, assert_same, generate
from e2e.tiny import LLAMA, prompt_without_ties, random_prompt, save_random
from reference.attention import rope_table
from reference.llama import Llama, random_tensors
from vllm_cascade.support.rotation import RotationError

MIXED = {
    "num_hidden_layers": 4,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Of a head size that vLLM's own CPU backend takes too.
WIDER = {**LLAMA, "hidden_size": 128, "head_dim": 32}
ORIGINAL = 512
SHORT = [1.0 + 0.1 * i for i in range(16)]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": SHORT,
    "long_factor": [2.0 * factor for factor in SHORT],
    "original_max_position_embeddings": ORIGINAL,
}
MROPE = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "mrope_section": [6, 5, 5],
    "mrope_interleaved": True,
}
TEMPERATURE = {"original_max_position_embeddings": ORIGINAL, "beta": 0.5}
CAPPED = {**WIDER, "attn_logit_softcapping": 2.0}
TRANSFORMERS = {"model_impl": "transformers"}


def plain() -> torch.Tensor:
    """The table of a Llama."""
    return rope_table(ORIGINAL, WIDER["head_dim"], WIDER["rope_theta"], torch.float32)


def nothing() -> torch.Tensor:
    """The table of a layer that does not rotate."""
    cos, sin = plain()
    return torch.stack((torch.ones_like(cos), torch.zeros_like(sin)))


def longrope() -> torch.Tensor:
    """The table of the factors for texts up to the original limit (arXiv 2402.13753)."""
    exponent = torch.arange(0, WIDER["head_dim"], 2) / WIDER["head_dim"]
    angle = torch.arange(ORIGINAL)[:, None] / (
        torch.tensor(SHORT) * WIDER["rope_theta"] ** exponent
    )
    scale = math.sqrt(1 + math.log(1024 / ORIGINAL) / math.log(ORIGINAL))
    return torch.stack((angle.cos(), angle.sin())) * scale


def like_llama(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    return {**WIDER, "architectures": [architecture], "model_type": model_type, **changes}


# What rotates -> config.json, the tables of its layers, engine arguments.
KINDS: dict[str, tuple[dict[str, Any], list[Any], dict[str, Any]]] = {
    "transformers": (WIDER, [plain] * 3, TRANSFORMERS),
    # Plain rotation: this backend gives a cap on logits to any model whose config.json has one.
    "soft-cap": (CAPPED, [plain] * 3, TRANSFORMERS),
    "some-layers": (
        like_llama("SmolLM3ForCausalLM", "smollm3", no_rope_layers=[1, 0, 1], pad_token_id=0),
        [plain, nothing, plain],
        {},
    ),
    "no-layer": (
        like_llama(
            "GraniteForCausalLM",
            "granite",
            rope_parameters={"rope_type": "default", "rope_theta": 0.0},
            attention_multiplier=32**-0.5,
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            logits_scaling=1.0,
        ),
        [nothing] * 3,
        {},
    ),
    "temperature": (
        like_llama(
            "MistralForCausalLM", "mistral", sliding_window=None, llama_4_scaling=TEMPERATURE
        ),
        [plain] * 3,
        {},
    ),
    "longrope": (
        like_llama(
            "Phi3ForCausalLM",
            "phi3",
            rope_parameters=LONGROPE,
            original_max_position_embeddings=ORIGINAL,
        ),
        [longrope] * 3,
        {},
    ),
    "mrope": (like_llama("TextAlone", "llama", rope_parameters=MROPE), [plain] * 3, {}),
}


def save(folder: Path, config: dict[str, Any]) -> Llama:
    """Write a Llama's weights as a model of `config`, and give the oracle of them."""
    tensors = random_tensors(WIDER, seed=0)
    saved = {name: tensor.float() for name, tensor in tensors.items()}
    for i in range(WIDER["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        if config["model_type"] == "phi3":
            for into, parts in FUSED.items():
                weights = [saved.pop(f"{layer}.{part}.weight") for part in parts]
                saved[f"{layer}.{into}.weight"] = torch.cat(weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    cap = config.get("attn_logit_softcapping")
    return Llama({**WIDER, "attn_logit_softcapping": cap}, tensors)


FUSED = {
    "self_attn.qkv_proj": [f"self_attn.{part}_proj" for part in "qkv"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
}


class TextAlone(LlamaForCausalLM, SupportsMRoPE):
    """The text half of a model with images, whose whole needs more packages than are installed."""

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """Give each token the same three positions, as such models do without images."""
        assert not mm_features
        return torch.arange(len(input_tokens)).expand(3, -1), 0


@pytest.fixture(scope="module", autouse=True)
def text_alone() -> None:
    ModelRegistry.register_model("TextAlone", TextAlone)


PROMPTS = [random_prompt(num_tokens, seed=num_tokens) for num_tokens in (5, 63, 160)]


def by_vllm(folder: Path, **options: Any) -> list[Answer]:
    """What vLLM's own attention answers to `PROMPTS`."""
    with engine(None, str(folder), max_model_len=ORIGINAL, **SHORT_STEPS, **options) as llm:
        return generate(llm, PROMPTS)


SHORT_STEPS = {"max_num_batched_tokens": 200, "skip_tokenizer_init": True}


@pytest.mark.parametrize("kind", KINDS)
def test_as_vllm_and_past_the_reach_as_the_oracle(tmp_path: Path, kind: str) -> None:
    config, tables, options = KINDS[kind]
    model = save(tmp_path, config)
    wanted = by_vllm(tmp_path, **options)
    check_past_reach(
        "distinct",
        lambda num_tokens: prompt_without_ties(num_tokens, seed=1),
        str(tmp_path),
        model,
        [table() for table in tables],
        lambda llm: assert_same(generate(llm, PROMPTS), wanted),
        skip_tokenizer_init=True,
        **options,
    )


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("cohere2", MIXED),
        ("olmo3", MIXED),
        ("vaultgemma", MIXED | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4}),
        # Interleaved pairs of half of the channels.
        ("glm", {}),
    ],
)
def test_others_as_vllm(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    save_random(tmp_path, model_type, **changes)
    wanted = by_vllm(tmp_path)
    options = {"max_model_len": 2048, "block_size": 32, **SHORT_STEPS}
    with engine(CASCADE, str(tmp_path), **options) as llm:
        kinds = [type(impl).__name__ for impl in impls_of(llm)]
        assert_same(generate(llm, PROMPTS), wanted)
    assert kinds.count("CascadeImpl") == (2 if changes else 3)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        # Its queries and keys are normalized once they are rotated.
        ("hunyuan_v1_dense", {}),
        # Its queries grow with their place in the text.
        ("ministral3", TRANSFORMERS),
    ],
)
def test_what_does_more_than_rotate_is_refused(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    save_random(tmp_path, model_type)
    with (
        pytest.raises(RotationError, match="does more than rotate"),
        engine(CASCADE, str(tmp_path), block_size=32, skip_tokenizer_init=True, **options),
    ):
        pass
