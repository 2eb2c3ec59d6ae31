"""Drives one layer through random schedules and says what the oracle makes of the same tokens.

Requests come in random cuts, mixed in batches, with permuted blocks in a pool full of NaN.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from reference.attention import rope_table, rotate, scored_attention
from reference.cascade import Cascade, CascadeParameters, Values
from vllm_cascade.attention.cpu_layer import CpuLayer
from vllm_cascade.attention.cpu_step import plan_step
from vllm_cascade.attention.trace import kept_in
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

KV_HEADS, SHARED, HEAD = 2, 3, 16
THETA = 10_000.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_TOKENS = 4096
SMALL = {"cache_tokens": 256, "num_sub_caches": 4, "num_sink_tokens": 32, "stride": 64}


def config_of(max_model_len: int, **options: object) -> CascadeConfig:
    given = {**SMALL, "trace_tokens": True, **options}
    return resolve(
        CascadeOptions.parse(given), block_size=16, max_model_len=max_model_len, position_limit=4096
    )


def oracle(
    config: CascadeConfig,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
):
    """Outputs [tokens, heads, head] and kept tokens at every boundary, in float64."""
    parameters = CascadeParameters.like(config)
    tokens = len(q)
    table = rope_table(4096, HEAD, THETA, torch.float64)
    cascade = Cascade(parameters, KV_HEADS)
    score = torch.zeros(KV_HEADS, tokens, dtype=torch.float64)
    query = q.double().view(tokens, KV_HEADS, SHARED, HEAD).permute(1, 2, 0, 3)
    key, value = k.double().transpose(0, 1), v.double().transpose(0, 1)
    outputs, kept = [], {}
    for start, end, number in parameters.segments(tokens):
        before = cascade.kept
        held = torch.cat((before, torch.arange(start, end).expand(KV_HEADS, -1)), dim=1)
        places = held.shape[1]
        spread = held[..., None].expand(-1, -1, HEAD)
        offset = torch.arange(start, end, dtype=torch.float64) - config.num_sink_tokens
        offset -= config.stride * max(number - 1, 0)
        weight = config.score_decay ** -(offset + 1)
        out, gain = scored_attention(
            rotate(query[:, :, start:end], table[:, before.shape[1] : places]),
            rotate(key.gather(1, spread), table[:, :places]),
            value.gather(1, spread),
            weight,
            config.score_power,
            config.score_reduction,
            None if sinks is None else sinks.double().view(KV_HEADS, SHARED, 1),
            soft_cap,
        )
        outputs.append(out.permute(2, 0, 1, 3).reshape(end - start, -1, HEAD))
        score.scatter_add_(1, held, gain)
        if end == parameters.boundary_token(number):
            if number:
                score *= config.score_decay**config.stride
            values = Values(parameters, score, key, value, held)
            cascade.finish_stride(range(start, end), values.choose)
            kept[end] = cascade.kept
    return torch.cat(outputs), kept


class Pool:
    """Poisoned pages and a block table.

    With `scales` of keys and of values, [KV_HEADS] each, pages are in FP8.
    """

    def __init__(
        self,
        config: CascadeConfig,
        num_requests: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.config, self.layout = config, build_layout(config)
        blocks = self.layout.max_blocks * num_requests
        slots, tail = KV_HEADS * config.block_size, config.needs_scores + config.trace_tokens
        if scales is not None:
            dtype = torch.float8_e4m3fn
        per_word = 4 // dtype.itemsize
        page = slots * 2 * HEAD + slots * tail * per_word
        # NaN in every dtype.
        pool = torch.full((blocks * page * dtype.itemsize,), 255, dtype=torch.uint8, device=device)
        pool = pool.view(dtype)
        kv = pool.view(blocks, page)[:, : slots * 2 * HEAD]
        self.pages = Pages.view(
            kv.view(blocks, KV_HEADS, config.block_size, 2 * HEAD),
            config.needs_scores,
            config.trace_tokens,
            *(() if scales is None else (scale.to(device) for scale in scales)),
        )
        self.table = torch.randperm(blocks).view(num_requests, -1).numpy().astype(np.int32)

    def kept(self, request: int, num_tokens: int) -> torch.Tensor:
        return kept_in(self.pages, self.layout, self.table[request], num_tokens).cpu()


class CpuEngine(Pool):
    """The least that runs a layer on a CPU."""

    def __init__(
        self,
        config: CascadeConfig,
        num_requests: int,
        dtype: torch.dtype,
        sinks: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        super().__init__(config, num_requests, dtype, scales=scales)
        cos, sin = rope_table(config.max_places, HEAD, THETA, torch.float32)
        self.layer = CpuLayer(config, HEAD**-0.5, cos, sin, True, sinks, soft_cap)

    def step(self, spans, q, k, v) -> torch.Tensor:
        """Run tokens start .. end - 1 of several requests; spans: (request, start, end)."""
        rows = [r for r, _, _ in spans]
        lengths = [end - start for _, start, end in spans]
        plan = plan_step(
            self.layout,
            np.cumsum([0, *lengths]),
            np.array([end for _, _, end in spans]),
            self.table[rows],
        )
        query, key, value = (
            torch.cat([x[r][start:end] for r, start, end in spans]) for x in (q, k, v)
        )
        output = torch.full_like(query, float("nan"))
        self.layer.forward(query, key, value, self.pages, plan, output)
        return output


class GpuEngine(Pool):
    """The least that runs a layer on a GPU, with room for one full cache at a time.

    With `follows` another layer, with tensors of its own, takes each step before it. Up to
    `most_tokens` tokens of a request are resolved on the device; then the host is told too many.
    """

    def __init__(
        self,
        config: CascadeConfig,
        num_requests: int,
        dtype: torch.dtype,
        sinks: torch.Tensor | None = None,
        follows: bool = False,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        most_tokens: int = 1,
        soft_cap: float = 0.0,
        max_keys: int = 700,
    ) -> None:
        from vllm_cascade.attention.gpu_layer import GpuLayer
        from vllm_cascade.attention.gpu_step import Planner
        from vllm_cascade.attention.gpu_workspace import Shape, make_workspace

        super().__init__(config, num_requests, dtype, DEVICE, scales)
        if sinks is not None:
            sinks = sinks.to(DEVICE, dtype)
        sinks_dtype = None if sinks is None else dtype
        pages_dtype = self.pages.kv.dtype
        shape = Shape(KV_HEADS * SHARED, KV_HEADS, HEAD, dtype, sinks_dtype, pages_dtype)
        workspace = make_workspace(config, shape, MAX_TOKENS, num_requests, DEVICE, most_tokens)
        self.counters = workspace.counters.zero_()
        cos, sin = (x.to(DEVICE) for x in rope_table(config.max_places, HEAD, THETA, torch.float32))
        table = (cos, sin, True)
        self.layer = GpuLayer(config, shape, HEAD**-0.5, *table, workspace, sinks, soft_cap)
        self.planner = Planner(self.layout, DEVICE, num_requests, max_keys, most_tokens)
        self.first = None
        if follows:
            others = (cos.clone(), sin.clone(), True, workspace, None if sinks is None else -sinks)
            self.first = GpuLayer(config, shape, HEAD**-0.5, *others, soft_cap)
            others = None if scales is None else tuple(2 * scale for scale in scales)
            self.first_pages = Pool(config, num_requests, dtype, DEVICE, others).pages

    def step(self, spans, q, k, v) -> torch.Tensor:
        """Run tokens start .. end - 1 of several requests; spans: (request, start, end)."""
        starts = np.cumsum([0, *(end - start for _, start, end in spans)]).astype(np.int32)
        lengths = np.array([end for _, _, end in spans], dtype=np.int32)
        rows = torch.from_numpy(self.table[[r for r, _, _ in spans]]).to(DEVICE)
        query, key, value = (
            torch.cat([x[r][start:end] for r, start, end in spans]).to(DEVICE) for x in (q, k, v)
        )
        most = self.planner.most_tokens
        unsure = np.diff(starts) <= most
        step = self.planner.plan(
            torch.from_numpy(starts).to(DEVICE),
            starts,
            torch.from_numpy(lengths).to(DEVICE),
            lengths + (most - 1) * unsure.astype(np.int32),
            rows,
        )
        if self.first is not None:
            parts = (torch.randn_like(x) for x in (query, key, value))
            self.first.forward(*parts, self.first_pages, step, torch.empty_like(query))
        output = torch.full_like(query, float("nan"))
        self.layer.forward(query, key, value, self.pages, step, output)
        return output.cpu()


def play(
    engine_of: Callable[..., Any],
    config: CascadeConfig,
    lengths: list[int],
    longest_cut: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
):
    """(output, kept by boundary, inputs) of every request after a random schedule.

    Args:
        engine_of: Called with (config, num_requests, dtype); has `step` and `kept`.
        config: The cascade.
        lengths: Tokens of each request.
        longest_cut: Most tokens of a request in a step.
        seed: Of inputs and schedule.
        dtype: Of inputs and pages.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    queries = [(torch.randn(n, KV_HEADS * SHARED, HEAD) * 2).to(dtype) for n in lengths]
    keys = [torch.randn(n, KV_HEADS, HEAD).to(dtype) for n in lengths]
    values = [torch.randn(n, KV_HEADS, HEAD).to(dtype) for n in lengths]
    engine = engine_of(config, len(lengths), dtype)
    done = [0] * len(lengths)
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    kept: list[dict[int, torch.Tensor]] = [{} for _ in lengths]
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        spans = []
        for r in draw.sample(range(len(lengths)), len(lengths)):
            count = draw.choice([1, draw.randint(1, longest_cut)])
            end = min(done[r] + count, lengths[r])
            if end > done[r]:
                spans.append((r, done[r], end))
        out = engine.step(spans, queries, keys, values)
        first = 0
        for r, start, end in spans:
            outputs[r].append(out[first : first + end - start])
            first += end - start
            done[r] = end
            kept[r][end] = engine.kept(r, end)
    return [torch.cat(o) for o in outputs], kept, (queries, keys, values)


POLICIES = [
    {"policy": "paper"},
    {"policy": "distinct", "selection_window": 64},
    {"policy": "blend", "selection_window": 64},
    {
        "policy": "blend",
        "selection_window": 32,
        "score_reduction": "mean",
        "score_power": 1.5,
        "score_weight": 2,
        "key_weight": 0.5,
        "value_weight": 0.25,
    },
    {
        "policy": "distinct",
        "selection_window": 16,
        "key_weight": 0,
        "structure": "elastic",
        "num_sub_caches": "auto",
    },
    {"policy": "paper", "selection_window": 16, "score_decay": 0.999},
    {"policy": "window", "num_sub_caches": 1},
]
