"""One layer on the CPU, through the step planner, against the oracle run stride by stride.

Requests come in random cuts, mixed in batches, with permuted blocks in a pool full of NaN.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from reference.attention import rope_table, rotate, scored_attention
from reference.cascade import Cascade, CascadeParameters, Values
from vllm_cascade.config import CascadeConfig, CascadeOptions
from vllm_cascade.kernels import cpu_attention, cpu_compaction
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.layout import build_layout
from vllm_cascade.metadata import plan_step
from vllm_cascade.trace import kept_in

KV_HEADS, SHARED, HEAD = 2, 3, 16
THETA = 10_000.0
SMALL = {"cache_tokens": 256, "num_sub_caches": 4, "num_sink_tokens": 32, "stride": 64}


def config_of(max_model_len: int, **options: object) -> CascadeConfig:
    given = {**SMALL, "trace_tokens": True, **options}
    return CascadeOptions.parse(given).resolve(
        block_size=16, max_model_len=max_model_len, position_limit=4096
    )


def oracle(config: CascadeConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
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
        )
        outputs.append(out.permute(2, 0, 1, 3).reshape(end - start, -1, HEAD))
        score.scatter_add_(1, held, gain)
        if end == parameters.boundary_token(number):
            if number:
                score *= config.score_decay**config.stride
            values = Values(parameters, score, key, held)
            cascade.finish_stride(range(start, end), values.choose)
            kept[end] = cascade.kept
    return torch.cat(outputs), kept


class Engine:
    """The least that runs a layer: a pool of poisoned pages and a block table."""

    def __init__(self, config: CascadeConfig, num_requests: int, dtype: torch.dtype) -> None:
        self.config, self.layout = config, build_layout(config)
        blocks = self.layout.max_blocks * num_requests
        slots, tail = KV_HEADS * config.block_size, config.needs_scores + 1
        per_word = 4 // dtype.itemsize
        page = slots * 2 * HEAD + slots * tail * per_word
        pool = torch.full((blocks * page,), float("nan"), dtype=dtype)
        kv = pool.view(blocks, page)[:, : slots * 2 * HEAD]
        self.pages = Pages.view(
            kv.view(blocks, KV_HEADS, config.block_size, 2 * HEAD), config.needs_scores, True
        )
        self.table = torch.randperm(blocks).view(num_requests, -1).numpy().astype(np.int32)
        cos, sin = rope_table(config.max_places, HEAD, THETA, torch.float32)
        self.rotary = cpu_attention.Rotary(cos, sin, is_neox=True)

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
        config = self.config
        scoring = None
        if config.needs_scores:
            scoring = cpu_attention.Scoring(config.score_power, config.score_reduction)
        for wave in plan.waves:
            self.pages.write(
                key[wave.rows], value[wave.rows], wave.block_ids, wave.offsets, wave.tokens
            )
            args = (self.rotary, HEAD**-0.5, scoring)
            for segment in wave.prefills:
                cpu_attention.prefill(output, query, self.pages, segment, *args)
            for batch in wave.decodes:
                cpu_attention.decode(output, query, self.pages, batch, *args)
            if wave.merge is not None:
                cpu_compaction.merge_groups(
                    self.pages, wave.merge, HEAD, config.selection_window, config.key_weight
                )
        return output

    def kept(self, request: int, num_tokens: int) -> torch.Tensor:
        return kept_in(self.pages, self.layout, self.table[request], num_tokens)


def play(
    config: CascadeConfig, lengths: list[int], longest_cut: int, seed: int, dtype=torch.float32
):
    """Yield (output, kept by boundary, inputs) of every request after a random schedule."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    queries = [(torch.randn(n, KV_HEADS * SHARED, HEAD) * 2).to(dtype) for n in lengths]
    keys = [torch.randn(n, KV_HEADS, HEAD).to(dtype) for n in lengths]
    values = [torch.randn(n, KV_HEADS, HEAD).to(dtype) for n in lengths]
    engine = Engine(config, len(lengths), dtype)
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
    {"policy": "blend"},
    {"policy": "blend", "score_reduction": "mean", "score_power": 1.5, "key_weight": 0.5},
    {"policy": "paper", "selection_window": 16, "score_decay": 0.999},
    {"policy": "window", "num_sub_caches": 1},
]


@pytest.mark.parametrize("options", POLICIES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("longest_cut", [1500, 40])
def test_layer_equals_oracle(options: dict, longest_cut: int) -> None:
    config = config_of(1500, **options)
    lengths = [1500, 900, 31, 320, 433]
    outputs, kept, (q, k, v) = play(config, lengths, longest_cut, seed=len(str(options)))
    for r in range(len(lengths)):
        expected, boundaries = oracle(config, q[r], k[r], v[r])
        torch.testing.assert_close(outputs[r], expected.float(), rtol=2e-4, atol=2e-5)
        for end in kept[r].keys() & boundaries.keys():
            if end < config.max_model_len:
                assert torch.equal(kept[r][end].long(), boundaries[end]), (r, end)


def test_bfloat16_rounds_only_weights_and_output() -> None:
    """Pages hold what the model computed and scores are float32: same choices."""
    config = config_of(900)
    outputs, kept, (q, k, v) = play(config, [900, 300], 200, seed=7, dtype=torch.bfloat16)
    for r in range(2):
        expected, boundaries = oracle(config, q[r], k[r], v[r])
        # The output rounds twice, to half a unit in the last of bfloat16's 8 bits each; so does
        # each weight, which shifts a mean of values by at most that of the largest value.
        error = (outputs[r].double() - expected).abs()
        assert (error <= expected.abs() * 2**-8 + v[r].abs().max().double() * 2**-9 + 2e-5).all()
        for end in kept[r].keys() & boundaries.keys():
            assert torch.equal(kept[r][end].long(), boundaries[end]), (r, end)


def test_every_boundary_is_seen() -> None:
    config = config_of(1200, policy="blend")
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 1200, h, HEAD) for h in (KV_HEADS * SHARED, KV_HEADS, KV_HEADS))
    engine = Engine(config, 1, torch.float32)
    _, boundaries = oracle(config, q[0], k[0], v[0])
    start = 0
    for end in sorted(boundaries):
        engine.step([(0, start, end)], q, k, v)
        assert torch.equal(engine.kept(0, end).long(), boundaries[end]), end
        start = end
    assert len(boundaries) == 19
