"""One layer on the CPU, through the step planner, against the oracle run stride by stride."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from layers import HEAD, KV_HEADS, POLICIES, SHARED, CpuEngine, config_of, oracle, play
from vllm_cascade.kernels.cpu import attention as cpu_attention
from vllm_cascade.structure.config import CascadeConfig


@pytest.mark.parametrize("options", POLICIES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("longest_cut", [1500, 40])
def test_layer_equals_oracle(options: dict, longest_cut: int) -> None:
    config = config_of(1500, **options)
    lengths = [1500, 900, 31, 320, 433]
    check(config, lengths, longest_cut, seed=len(str(options)))


def test_sink_logits_join_every_softmax() -> None:
    sinks = torch.linspace(-2, 3, KV_HEADS * SHARED)
    check(config_of(900, policy="paper"), [900, 300], 200, seed=5, sinks=sinks)


@pytest.mark.parametrize("options", POLICIES[:3], ids=lambda o: o["policy"])
def test_a_soft_cap_bounds_every_logit(options: dict) -> None:
    """It changes what is attended to and, where scores are kept, what survives."""
    check(config_of(900, **options), [900, 300], 200, seed=6, soft_cap=1.0)


def check(
    config: CascadeConfig,
    lengths: list[int],
    longest_cut: int,
    seed: int,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Hold outputs, and what is kept after each step, against the oracle."""
    engine_of = partial(CpuEngine, sinks=sinks, soft_cap=soft_cap)
    outputs, kept, (q, k, v) = play(engine_of, config, lengths, longest_cut, seed)
    for r in range(len(lengths)):
        expected, boundaries = oracle(config, q[r], k[r], v[r], sinks, soft_cap)
        torch.testing.assert_close(outputs[r], expected.float(), rtol=2e-4, atol=2e-5)
        for end in kept[r].keys() & boundaries.keys():
            if end < config.max_model_len:
                assert torch.equal(kept[r][end].long(), boundaries[end]), (r, end)
        if soft_cap:
            plain, others = oracle(config, q[r], k[r], v[r], sinks)
            assert (plain - expected).abs().max() > 0.1
            last = max(boundaries)
            same = torch.equal(others[last], boundaries[last])
            assert same != (config.needs_scores and r == 0)


def test_bfloat16_rounds_only_weights_and_output() -> None:
    """Pages hold what the model computed and scores are float32: same choices."""
    config = config_of(900, policy="blend", selection_window=64)
    outputs, kept, (q, k, v) = play(
        CpuEngine, config, [900, 300], 200, seed=7, dtype=torch.bfloat16
    )
    for r in range(2):
        expected, boundaries = oracle(config, q[r], k[r], v[r])
        # The output rounds twice, to half a unit in the last of bfloat16's 8 bits each; so does
        # each weight, which shifts a mean of values by at most that of the largest value.
        error = (outputs[r].double() - expected).abs()
        assert (error <= expected.abs() * 2**-8 + v[r].abs().max().double() * 2**-9 + 2e-5).all()
        for end in kept[r].keys() & boundaries.keys():
            assert torch.equal(kept[r][end].long(), boundaries[end]), (r, end)


def test_every_boundary_is_seen() -> None:
    config = config_of(1200, policy="blend", selection_window=64)
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 1200, h, HEAD) for h in (KV_HEADS * SHARED, KV_HEADS, KV_HEADS))
    engine = CpuEngine(config, 1, torch.float32)
    _, boundaries = oracle(config, q[0], k[0], v[0])
    start = 0
    for end in sorted(boundaries):
        engine.step([(0, start, end)], q, k, v)
        assert torch.equal(engine.kept(0, end).long(), boundaries[end]), end
        start = end
    assert len(boundaries) == 19


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1100, 1100), (1100, 1301), (30, 95)])
def test_attention_without_scores(num_queries: int, num_keys: int) -> None:
    """Many queries after a prefix take several turns."""
    torch.manual_seed(0)
    query = torch.randn(KV_HEADS * SHARED, num_queries, HEAD)
    key, value = torch.randn(2, KV_HEADS, num_keys, HEAD)
    logits = query.double().unflatten(0, (KV_HEADS, -1)) @ key.double().transpose(1, 2)[:, None]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    probs = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = (probs @ value.double()[:, None]).flatten(0, 1)
    torch.testing.assert_close(
        cpu_attention._attend(query, key, value), expected.float(), rtol=1e-4, atol=1e-5
    )
