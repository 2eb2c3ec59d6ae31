"""Learned sink logits, which join the softmax's denominator and get neither value nor score.

And a soft cap on keys' logits, which leaves the sinks' alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from reference import paged_decode, scored_prefill
from reference.attention import full_attention, scored_attention
from vllm_cascade.kernels.cpu import attention as cpu_attention
from vllm_cascade.kernels.pages import Pages

KV_HEADS, SHARED, HEAD, BLOCK = 2, 3, 16, 16
HEADS = KV_HEADS * SHARED
KEYS, QUERIES = 45, 20
SINKS = torch.tensor([-3.0, 0.5, 2.0, 40.0, -60.0, 4.0])
CAP = 2.0


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: int, soft_cap: float
) -> tuple:
    """Output and probabilities [heads, queries, keys] of causal attention in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(SHARED, dim=0) for x in (k, v))
    logits = q @ k.transpose(1, 2) * HEAD**-0.5
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    places = first + torch.arange(len(query))
    logits[:, places[:, None] < torch.arange(len(key))] = float("-inf")
    column = SINKS.double()[:, None, None].expand(-1, len(query), 1)
    probs = torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
    return (probs @ v).transpose(0, 1), probs


def run(single: bool, soft_cap: float) -> None:
    torch.manual_seed(1)
    query = 2 * torch.randn(QUERIES, HEADS, HEAD)
    key, value = torch.randn(2, KEYS, KV_HEADS, HEAD).unbind()
    num_blocks = -(-KEYS // BLOCK)
    pool = torch.full((num_blocks + 1, KV_HEADS, BLOCK, 2 * HEAD + 1), float("nan"))
    pages = Pages(pool[..., :-1].contiguous(), torch.zeros(num_blocks + 1, KV_HEADS, BLOCK), None)
    blocks = torch.tensor([3, 1, 2])
    at = torch.arange(KEYS)
    pages.write(key, value, blocks[at // BLOCK], at % BLOCK, None)
    still = torch.zeros(KEYS, HEAD // 2)
    rotary = cpu_attention.Rotary(still + 1, still, is_neox=True)  # no rotation
    scoring = cpu_attention.Scoring(2.0, "max")
    how = (rotary, HEAD**-0.5, scoring, SINKS, soft_cap)
    output = torch.full_like(query, float("nan"))
    if single:
        query, output = query[:1], output[:1]
        batch = cpu_attention.DecodeBatch(
            rows=torch.tensor([0]),
            places=torch.tensor([KEYS - 1]),
            block_ids=blocks,
            block_row=torch.zeros(num_blocks, dtype=torch.int64),
            block_place=torch.arange(num_blocks),
            carry=torch.ones(1),
            weights=torch.ones(1),
        )
        cpu_attention.decode(output, query, pages, batch, *how)
    else:
        segment = cpu_attention.PrefillSegment(
            0, QUERIES, blocks, KEYS - QUERIES, carry=1.0, weights=torch.ones(QUERIES)
        )
        cpu_attention.prefill(output, query, pages, segment, *how)
    attended, probs = expected(query, key, value, KEYS - len(query), soft_cap)
    torch.testing.assert_close(output.double(), attended, rtol=1e-4, atol=1e-5)
    gained = probs.view(KV_HEADS, SHARED, len(query), KEYS).amax(1).square().sum(1)
    assert pages.score is not None
    score = pages.score[blocks].transpose(0, 1).flatten(1)[:, :KEYS]
    torch.testing.assert_close(score.double(), gained, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("soft_cap", [0.0, CAP])
def test_of_a_chunk(soft_cap: float) -> None:
    run(single=False, soft_cap=soft_cap)


@pytest.mark.parametrize("soft_cap", [0.0, CAP])
def test_of_a_single_token(soft_cap: float) -> None:
    run(single=True, soft_cap=soft_cap)


@pytest.mark.parametrize("soft_cap", [0.0, CAP])
def test_of_the_references(soft_cap: float) -> None:
    """Each gives outputs, scores and log-sum-exps as of the softmax over one more column."""
    torch.manual_seed(2)
    query = 2 * torch.randn(QUERIES, HEADS, HEAD, dtype=torch.float64)
    key, value = torch.randn(2, KEYS, KV_HEADS, HEAD, dtype=torch.float64).unbind()
    attended, probs = expected(query, key, value, KEYS - QUERIES, soft_cap)
    gained = probs.view(KV_HEADS, SHARED, QUERIES, KEYS).square().amax(1)
    same = {"rtol": 0, "atol": 1e-13}

    split = query.transpose(0, 1).view(KV_HEADS, SHARED, QUERIES, HEAD)
    sinks = SINKS.view(KV_HEADS, SHARED, 1)
    ones = torch.ones(QUERIES, dtype=torch.float64)
    keys, values = key.transpose(0, 1), value.transpose(0, 1)
    output, score = scored_attention(split, keys, values, ones, 2.0, "max", sinks, soft_cap)
    torch.testing.assert_close(output.flatten(0, 1).transpose(0, 1), attended, **same)
    torch.testing.assert_close(score, gained.sum(1), **same)

    segments = SimpleNamespace(
        query_spans=torch.tensor([[0, QUERIES]]), key_spans=torch.tensor([[0, KEYS]])
    )
    lse = torch.empty(HEADS, QUERIES, dtype=torch.float64)
    given = (query, key, value, segments, 0.25, SINKS, soft_cap)
    scored_prefill.attend(output := query.clone(), lse, *given)
    torch.testing.assert_close(output, attended, **same)
    logits = 0.25 * torch.einsum("nhd,mhd->hnm", query, key.repeat_interleave(SHARED, dim=1))
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    first_key = (logits[..., 0] - lse).exp()
    torch.testing.assert_close(first_key, probs[..., 0], **same)

    kv = torch.cat((keys, values), dim=-1)[None]
    pages = SimpleNamespace(kv=kv, score=torch.zeros(1, KV_HEADS, KEYS, dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)
    batch = SimpleNamespace(
        rows=torch.tensor([QUERIES - 1]),
        places=torch.tensor([KEYS - 1]),
        block_table=torch.zeros(1, 1, dtype=torch.int64),
        carry=one,
        weights=one,
    )
    still = torch.zeros(KEYS, HEAD // 2, dtype=torch.float64)
    table = (still + 1, still, True)
    rest = {"sinks": SINKS, "soft_cap": soft_cap}
    paged_decode.decode(
        output := query.clone(), query, pages, batch, *table, 0.25, 2.0, "max", **rest
    )
    torch.testing.assert_close(output[-1], attended[-1], **same)
    torch.testing.assert_close(pages.score[0], gained[:, -1], **same)


def test_soft_cap_is_gemma_2s() -> None:
    modeling = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    torch.manual_seed(3)
    query = 3 * torch.randn(KV_HEADS, SHARED, KEYS, HEAD, dtype=torch.float64)
    key, value = torch.randn(2, KV_HEADS, KEYS, HEAD, dtype=torch.float64)
    module = SimpleNamespace(head_dim=HEAD, num_key_value_groups=SHARED, training=False)
    mask = torch.full((KEYS, KEYS), float("-inf"), dtype=torch.float64).triu(1)
    # It takes the softmax in float32.
    theirs, _ = modeling.eager_attention_forward(
        module, query.flatten(0, 1)[None], key[None], value[None], mask, softcap=CAP
    )
    ours = full_attention(query, key, value, soft_cap=CAP)
    plain = full_attention(query, key, value)
    torch.testing.assert_close(ours.flatten(0, 1).transpose(0, 1), theirs[0], rtol=0, atol=1e-6)
    assert (plain - ours).abs().max() > 0.1
