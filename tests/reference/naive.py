"""The whole model once more, deliberately naive: one query at a time, a dictionary of kept tokens.

Slow, and written from the text of the design alone, to judge the vectorised oracle by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference.cascade import CascadeParameters


class NaiveHead:
    """One KV head of one layer.

    Args:
        settings: The configuration.
        theta: RoPE's base.
    """

    def __init__(self, settings: CascadeParameters, theta: float) -> None:
        self.settings = settings
        self.theta = theta
        self.sinks: list[int] = []
        self.caches: list[list[int]] = [[] for _ in range(settings.num_sub_caches)]
        self.stride: list[int] = []
        self.filling = True
        self.key: dict[int, np.ndarray] = {}
        self.value: dict[int, np.ndarray] = {}
        self.score: dict[int, float] = {}

    @property
    def order(self) -> list[int]:
        """The tokens held, by logical place."""
        return self.sinks + [t for cache in reversed(self.caches) for t in cache] + self.stride

    def step(self, t: int, queries: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Compute token t: attend, score, and at a boundary bring the cache to its budget.

        Args:
            t: Index of the token in the request.
            queries: [group, head_size], before RoPE.
            key: [head_size], before RoPE.
            value: [head_size].

        Returns:
            [group, head_size].
        """
        settings = self.settings
        self.stride.append(t)
        self.key[t], self.value[t], self.score[t] = key, value, 0.0
        order = self.order
        turned = np.array([turn(self.key[j], i, self.theta) for i, j in enumerate(order)])
        probabilities, outputs = [], []
        for query in queries:
            q = turn(query, len(order) - 1, self.theta)
            logits = (turned @ q.conj()).real / len(key) ** 0.5
            p = np.exp(logits - logits.max())
            p = p / p.sum()
            probabilities.append(p)
            outputs.append(sum(p[i] * self.value[j] for i, j in enumerate(order)))
        offset = t - settings.num_sink_tokens
        if offset >= 0:
            offset %= settings.stride
        combine = max if settings.score_reduction == "max" else np.mean
        for i, j in enumerate(order):
            amount = combine([p[i] ** settings.score_power for p in probabilities])
            self.score[j] += settings.score_decay ** -(offset + 1) * amount
        if t + 1 == settings.num_sink_tokens:
            self.sinks, self.stride = self.stride, []
        elif t >= settings.num_sink_tokens and offset + 1 == settings.stride:
            self._boundary()
        return np.array(outputs)

    def _boundary(self) -> None:
        settings, sizes = self.settings, self.settings.sub_cache_tokens
        group = max(settings.selection_window, 2 * settings.block_size)
        for j in self.score:
            self.score[j] *= settings.score_decay**settings.stride
        weights = (settings.score_weight, settings.key_weight, settings.value_weight)
        worths = (self.score, self._distinct(self.key), self._distinct(self.value))
        caches = self.caches
        caches[0] += self.stride
        self.stride = []
        for i in range(len(caches)):  # filling: whole tokens move on while there is room
            later = zip(sizes[i + 1 :], caches[i + 1 :], strict=True)
            room = sum(max(0, size - len(cache)) for size, cache in later)
            while self.filling and len(caches[i]) > sizes[i] and room > 0:
                caches[i + 1].append(caches[i].pop(0))
                room -= 1
        self.filling = len(self.order) - len(self.sinks) <= sum(sizes)
        if self.filling:
            return
        for i in range(len(caches) - 1):
            while len(caches[i]) >= sizes[i] + group:
                leaving, caches[i] = caches[i][:group], caches[i][group:]
                for j in range(0, group, settings.selection_window):
                    window = leaving[j : j + settings.selection_window]
                    caches[i + 1] += self._survivors(window, weights, worths)
        while len(caches[-1]) >= sizes[-1] + settings.block_size:
            del caches[-1][: settings.block_size]
        kept = set(self.order)
        for table in (self.key, self.value, self.score):
            for j in set(table) - kept:
                del table[j]

    def _distinct(self, vectors: dict[int, np.ndarray]) -> dict[int, float]:
        units = {j: vectors[j] / np.sqrt((vectors[j] ** 2).sum()) for j in self.order}
        some = [unit for place, unit in enumerate(units.values()) if place // 32 % 4 == 0]
        mean = sum(some) / len(some)
        return {j: -float(unit @ mean) for j, unit in units.items()}

    def _survivors(
        self,
        window: list[int],
        weights: Sequence[float],
        worths: Sequence[dict[int, float]],
    ) -> list[int]:
        total = dict.fromkeys(window, 0.0)
        for weight, worth in zip(weights, worths, strict=True):
            for position, j in enumerate(sorted(window, key=lambda j: (worth[j], j))):
                total[j] += weight * position
        best = sorted(window, key=lambda j: (total[j], j))
        return sorted(best[len(window) // 2 :])


def turn(x: np.ndarray, place: int, theta: float) -> np.ndarray:
    """RoPE as a rotation of complex numbers: [head_size] -> complex [head_size / 2]."""
    half = len(x) // 2
    return (x[:half] + 1j * x[half:]) * _rotation(place, half, theta)


@cache
def _rotation(place: int, half: int, theta: float) -> np.ndarray:
    frequency = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
    angle = torch.tensor(float(place)) * frequency  # float32 like the models'
    return angle.cos().double().numpy() + 1j * angle.sin().double().numpy()


def naive_run(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokens: Sequence[int],
    settings: CascadeParameters,
) -> tuple[list[float], dict[int, list[list[list[int]]]]]:
    """Run a model with tied embeddings over a token sequence, token by token.

    Args:
        config: As in config.json.
        tensors: The weights by their Hugging Face names, float64.
        tokens: The n tokens.
        settings: The cascade.

    Returns:
        The n - 1 log-probabilities of the following tokens, and boundary -> [layer][KV head] the
        tokens kept.
    """
    weight = {name.removesuffix(".weight"): tensor.numpy() for name, tensor in tensors.items()}
    num_kv_heads, head_size = config["num_key_value_heads"], config["head_dim"]
    group = config["num_attention_heads"] // num_kv_heads
    layers = [
        [NaiveHead(settings, config["rope_theta"]) for _ in range(num_kv_heads)]
        for _ in range(config["num_hidden_layers"])
    ]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + config["rms_norm_eps"]) * weight[name]

    logprobs, kept = [], {}
    for t, token in enumerate(tokens):
        x = weight["model.embed_tokens"][token]
        for layer, heads in enumerate(layers):
            name = f"model.layers.{layer}"
            h = norm(x, f"{name}.input_layernorm")
            q, k, v = (
                (weight[f"{name}.self_attn.{part}_proj"] @ h).reshape(-1, head_size)
                for part in "qkv"
            )
            out = [
                head.step(t, q[i * group : (i + 1) * group], k[i], v[i]).reshape(-1)
                for i, head in enumerate(heads)
            ]
            x = x + weight[f"{name}.self_attn.o_proj"] @ np.concatenate(out)
            h = norm(x, f"{name}.post_attention_layernorm")
            gate = weight[f"{name}.mlp.gate_proj"] @ h
            up = weight[f"{name}.mlp.up_proj"] @ h
            x = x + weight[f"{name}.mlp.down_proj"] @ (gate / (1 + np.exp(-gate)) * up)
        logits = weight["model.embed_tokens"] @ norm(x, "model.norm")
        if t + 1 < len(tokens):
            logprobs.append(logits[tokens[t + 1]] - np.log(np.exp(logits).sum()))
        past = t + 1 - settings.num_sink_tokens
        if past > 0 and past % settings.stride == 0:
            kept[past // settings.stride] = [[head.order for head in heads] for heads in layers]
    return logprobs, kept
