"""The latency protocol's module, its rows, and what it refuses to report."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from layer import paper_protocol as protocol
from records import Counts, RefusalError
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.options import PRESETS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = replace(protocol.SMALL, tokens=(48, 230), sides=(("paper", 64),), hidden=32)


@pytest.fixture(scope="module")
def bench() -> Any:
    """Past the budget of 128 tokens and the first boundary that merges."""
    with torch.inference_mode():
        yield protocol.Bench(SIZES, DEVICE)


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REPEATED", 0)


def test_attention_stands_between_the_projections(bench: Any) -> None:
    """Of the module's own hidden states, in float64; no baseline rotates anything."""
    module, tokens, (heads, kv_heads) = bench.module, 48, (4, 2)
    bench.theirs(protocol.FLASH3, tokens)
    hidden = module.hidden[:tokens].double()
    qkv = (hidden @ module.qkv.double().T).view(tokens, heads + 2 * kv_heads, -1).transpose(0, 1)
    query, key, value = qkv.split([heads, kv_heads, kv_heads])
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    expected = attended.transpose(0, 1).flatten(1) @ module.out.double().T
    error = (module.result[:tokens].double() - expected).abs().max()
    # Three matrix products of at most 256 terms, of values near one.
    assert error < 256 * torch.finfo(module.hidden.dtype).eps
    assert float(expected.abs().mean()) > 0.05


def test_the_cascade_projects_what_it_attends(bench: Any) -> None:
    row = bench.ours("paper", 64, 230)
    module = bench.module
    assert (row["side"], row["stride"], row["tokens"], row["runs"]) == ("CASCADE", 64, 230, 1)
    assert row["ms_p50"] > 0
    expected = module.attended[:230].flatten(1) @ module.out.T
    torch.testing.assert_close(module.result[:230], expected)


def test_other_work_than_the_layout_has_is_refused(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = bench.driver("paper", 64)
    one_more = Counts(1, 1, 1)
    monkeypatch.setattr(type(driver), "predicted", lambda *_: one_more)
    with pytest.raises(RefusalError, match="by the layout it is"):
        bench.ours("paper", 64, 48)


def test_an_output_that_is_not_finite_is_refused(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol.Module, "finish", lambda *_: None)
    with pytest.raises(RefusalError, match="not finite"):
        bench.ours("paper", 64, 48)


def test_ratios_are_of_the_same_length() -> None:
    rows = [
        {"side": side, "policy": policy, "tokens": tokens, "ms_p50": ms}
        for side, policy, tokens, ms in (
            (protocol.FLASH2, "", 64, 8.0),
            (protocol.FLASH3, "", 64, 4.0),
            (protocol.OURS, "paper", 64, 2.0),
            (protocol.FLASH2, "", 128, 32.0),
            (protocol.OURS, "paper", 128, 4.0),
        )
    ]
    protocol.compare(rows)
    assert (rows[2]["fa2_over_ours"], rows[2]["fa3_over_ours"]) == (4.0, 2.0)
    assert (rows[4]["fa2_over_ours"], rows[4]["fa3_over_ours"]) == (8.0, None)


def test_the_sweep_is_the_papers() -> None:
    sizes = protocol.FULL
    assert (sizes.tokens[0], sizes.tokens[-1], len(sizes.tokens)) == (4096, 1 << 20, 9)
    strides = [stride for policy, stride in sizes.sides if policy == "paper"]
    assert strides == [4096, 2048, 1024, 512, 256]
    assert ("distinct", 4096) in sizes.sides and ("blend", 4096) in sizes.sides
    for policy, stride in sizes.sides:
        config = protocol.make_config(
            sizes.tokens[-1],
            policy=policy,
            stride=stride,
            **protocol.options_of(policy, sizes.cascade),
        )
        assert (config.cache_tokens, config.num_sub_caches) == (16_384, 4)
        # As users have them.
        assert config.selection_window == PRESETS[policy]["selection_window"]
        assert config.needs_scores == (policy != "distinct")


@pytest.mark.parametrize("sizes", [protocol.FULL, protocol.SMALL], ids=["full", "small"])
def test_every_policy_is_checked_across_boundaries(sizes: Any) -> None:
    """Where a check is to prove something, groups merge in prefill and in decode."""
    for policy in dict.fromkeys(policy for policy, _ in sizes.sides):
        options = protocol.options_of(policy, sizes.checked)
        layout = build_layout(protocol.make_config(680, policy=policy, **options))
        ends = [epoch.end for epoch in layout.epochs if len(epoch.groups)]
        assert ends[0] < 340 - 6
        assert any(340 - 6 < end < 340 for end in ends)


def test_the_default_policy_runs_too(bench: Any) -> None:
    row = bench.ours("distinct", 64, 230)
    assert (row["policy"], row["stride"], row["tokens"]) == ("distinct", 64, 230)
