"""A whole Llama-architecture model with the cascade, teacher-forced over one token sequence.

The sequence is known in advance, so the model runs layer by layer over all of it; inside a layer
the attention runs from boundary to boundary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from reference.attention import full_attention, rope_table, rotate
from reference.cascade import CascadeParameters
from reference.cascade_attention import CascadeRun
from reference.replay import Comparison

ROWS_AT_ONCE = 256  # rows of logits or of the MLP's hidden layer held in memory at a time


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shapes and constants of a model, by their names in a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    attn_logit_softcapping: float

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a config.json.

        Raises:
            ValueError: If the model is not a plain Llama: scaled RoPE, biases, or another
                activation.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"the reference knows the default RoPE only, got {rope_type!r}")
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ValueError("the reference knows layers without bias only")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"the reference knows SiLU only, got {config['hidden_act']!r}")
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=config.get("rope_theta") or rope.get("rope_theta", 10_000.0),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attn_logit_softcapping=config.get("attn_logit_softcapping") or 0.0,
        )


@dataclass(slots=True)
class Run:
    """What a run over n tokens gives.

    Attributes:
        logprobs: [n - 1]; element t is the log-probability of token t + 1 after tokens 0 .. t.
        top_logprobs: [n, top], descending, and `top_tokens` int64 [n, top], their tokens.
        kept: Boundary k >= 1 -> int64 [num_layers, num_kv_heads, places], the tokens held after
            it by logical place: sinks, sub-cache N-1 ... 0.
        comparison: The replayed decisions against the reference's own.
    """

    logprobs: Tensor
    top_logprobs: Tensor
    top_tokens: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)
    comparison: Comparison = field(default_factory=Comparison)


class Llama:
    """A model in `dtype`.

    Args:
        config: As in config.json.
        tensors: The weights by their Hugging Face names, in any dtype.
        dtype: float64 or float32: what everything is computed in.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.config = LlamaConfig.parse(config)
        self.tensors = tensors
        self.dtype = dtype

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype = torch.float64) -> Llama:
        """Load a saved Hugging Face model: config.json and *.safetensors.

        Raises:
            FileNotFoundError: If the folder has no weights.
        """
        folder = Path(folder)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no *.safetensors in {folder}")
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        return cls(json.loads((folder / "config.json").read_text()), tensors, dtype)

    @torch.no_grad()
    def run(
        self,
        tokens: Sequence[int] | Tensor,
        parameters: CascadeParameters | None = None,
        forced: Mapping[int, Tensor] | None = None,
        rtol: float = 1e-4,
        top: int = 1,
        ropes: Sequence[Tensor] | None = None,
    ) -> Run:
        """Run over a token sequence.

        Args:
            tokens: The n tokens.
            parameters: The cascade, or None for plain full attention.
            forced: Decisions to replay: boundary k -> int64 [num_layers, num_kv_heads, places], as
                in `Run.kept`. At a boundary that is absent the reference decides itself.
            rtol: Distance under which a replayed decision may differ; see `replay.explained`.
            top: How many of the best next tokens to return for each position.
            ropes: The table of each layer, [2, places, head_size / 2] as of `rope_table`, where it
                is not the configuration's.

        Returns:
            The run; without `parameters` its `kept` is empty.

        Raises:
            ReplayError: If `forced` cannot come from the states that it was replayed on.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64)
        cascade = None
        if parameters is not None:
            shape = self.config
            cascade = CascadeRun(
                parameters,
                forced or {},
                rtol,
                shape.num_hidden_layers,
                shape.attn_logit_softcapping,
            )
        hidden = self._weight("model.embed_tokens")[ids]
        places = len(ids)
        if parameters is not None:
            places = min(places, parameters.max_tokens_held)
        if ropes is None:
            rope = rope_table(places, self.config.head_dim, self.config.rope_theta, self.dtype)
            ropes = [rope] * self.config.num_hidden_layers
        for layer, rope in enumerate(ropes):
            hidden = self._layer(layer, hidden, rope[:, :places].to(self.dtype), cascade)
        run = self._next_tokens(hidden, ids, top)
        if cascade is not None:
            run.kept = {k: torch.stack(layers) for k, layers in cascade.kept.items()}
            run.comparison = cascade.comparison
        return run

    def _layer(
        self, layer: int, hidden: Tensor, rope: Tensor, cascade: CascadeRun | None
    ) -> Tensor:
        name, heads = f"model.layers.{layer}", self.config.num_key_value_heads
        normed = self._norm(hidden, f"{name}.input_layernorm")
        # [num_kv_heads, group, tokens, head_size] and [num_kv_heads, tokens, head_size]
        query = self._project(normed, f"{name}.self_attn.q_proj").unflatten(0, (heads, -1))
        key = self._project(normed, f"{name}.self_attn.k_proj")
        value = self._project(normed, f"{name}.self_attn.v_proj")
        if cascade is None:
            cap = self.config.attn_logit_softcapping
            attended = full_attention(rotate(query, rope), rotate(key, rope), value, soft_cap=cap)
        else:
            attended = cascade.attend(layer, query, key, value, rope)
        attended = attended.flatten(0, 1).transpose(0, 1).flatten(1)
        hidden = hidden + attended @ self._weight(f"{name}.self_attn.o_proj").T
        normed = self._norm(hidden, f"{name}.post_attention_layernorm")
        gate = self._weight(f"{name}.mlp.gate_proj")
        up = self._weight(f"{name}.mlp.up_proj")
        down = self._weight(f"{name}.mlp.down_proj")
        rows = normed.split(ROWS_AT_ONCE)
        mixed = [(torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T for x in rows]
        return hidden + torch.cat(mixed)

    def _next_tokens(self, hidden: Tensor, ids: Tensor, top: int) -> Run:
        hidden = self._norm(hidden, "model.norm")
        tied = self.config.tie_word_embeddings
        head = self._weight("model.embed_tokens" if tied else "lm_head")
        logprobs, values, indices = [], [], []
        for rows, following in zip(
            hidden.split(ROWS_AT_ONCE), ids.roll(-1).split(ROWS_AT_ONCE), strict=True
        ):
            every = (rows @ head.T).log_softmax(-1)
            logprobs.append(every.gather(1, following[:, None])[:, 0])
            best = every.topk(top)
            values.append(best.values)
            indices.append(best.indices)
        return Run(torch.cat(logprobs)[:-1], torch.cat(values), torch.cat(indices))

    def _weight(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"].to(self.dtype)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return x * scale * self._weight(name)

    def _project(self, x: Tensor, name: str) -> Tensor:
        """Project to heads: [tokens, hidden] -> [heads, tokens, head_size]."""
        return (x @ self._weight(name).T).unflatten(1, (-1, self.config.head_dim)).transpose(0, 1)


def random_tensors(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Draw weights, float64, for a model that is too small or too shapeless to be downloaded.

    Args:
        config: As in config.json.
        seed: Of the draw.

    Returns:
        The weights by their Hugging Face names; attention is sharp enough to tell keys apart.
    """
    shape = LlamaConfig.parse(config)
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": draw(shape.vocab_size, hidden)}
    for layer in range(shape.num_hidden_layers):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = 1 + draw(hidden, scale=0.1)
        for part, rows, columns, gain in (
            ("self_attn.q_proj", queries, hidden, 1.5),
            ("self_attn.k_proj", keys, hidden, 1.5),
            ("self_attn.v_proj", keys, hidden, 1.0),
            ("self_attn.o_proj", hidden, queries, 1.0),
            ("mlp.gate_proj", inner, hidden, 1.0),
            ("mlp.up_proj", inner, hidden, 1.0),
            ("mlp.down_proj", hidden, inner, 1.0),
        ):
            tensors[f"{name}.{part}.weight"] = draw(rows, columns, scale=gain * columns**-0.5)
    tensors["model.norm.weight"] = 1 + draw(hidden, scale=0.1)
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = draw(shape.vocab_size, hidden, scale=hidden**-0.5)
    return tensors
