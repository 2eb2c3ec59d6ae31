"""Token counts turned into costs, against the layout that serves requests."""

import subprocess
import sys

import pytest

from vllm_cascade.structure.accounting import (
    boundaries_run,
    computed_tokens,
    final_span,
    kept_whole,
    past_budget,
    span_buckets,
    startup_line,
    tokens_evicted,
)
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

CONFIGS = [
    {},
    {"cache_tokens": 512, "stride": 64, "selection_window": 16},
    {"cache_tokens": 250, "stride": 128, "selection_window": 64, "newest_share": 0.3},
    {"policy": "paper", "num_sub_caches": 4, "cache_tokens": 256},
    {"policy": "paper", "num_sub_caches": 3, "cache_tokens": 208, "stride": 32},
    {"policy": "window", "cache_tokens": 128, "stride": 96},
    {"num_sub_caches": 1, "cache_tokens": 512},
    {"num_sub_caches": 2, "cache_tokens": 512, "num_sink_tokens": 0, "stride": 512},
    {"num_sub_caches": 7, "cache_tokens": 1008, "stride": 64, "selection_window": 64},
    {"num_sub_caches": 5, "cache_tokens": 1200, "selection_window": 128, "stride": 256},
]


def settle(options, max_model_len=6000, block_size=16):
    return resolve(
        CascadeOptions.parse(options),
        block_size=block_size,
        max_model_len=max_model_len,
        position_limit=4096,
    )


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("max_model_len", [6000, 1601, 64 + 1024, 100])
def test_costs_are_those_of_the_layout(options, max_model_len):
    config = settle(options, max_model_len)
    layout = build_layout(config)
    ends, merges = {epoch.end for epoch in layout.epochs[:-1]}, 0
    for num_tokens in range(1, max_model_len + 1):
        (segment,) = layout.segments(num_tokens - 1, num_tokens)
        assert segment.merges == (num_tokens in ends)
        merges += segment.merges
        assert boundaries_run(config, num_tokens) == merges, num_tokens
        evicted = num_tokens - layout.held(num_tokens)[1]
        assert tokens_evicted(config, num_tokens) == evicted, num_tokens
        assert evicted == 0 or past_budget(config, num_tokens)


def test_past_the_budget_starts_one_token_beyond_what_is_kept():
    config = settle({"num_sub_caches": 4, "cache_tokens": 256})
    assert kept_whole(config) == 64 + 256
    assert not past_budget(config, 320)
    assert past_budget(config, 321)
    # The cache is overfull for up to a stride before anything goes.
    assert tokens_evicted(config, 321) == 0


def test_the_span_ends_at_the_reach():
    config = settle({"num_sub_caches": 4, "cache_tokens": 256, "newest_share": 0.0})
    assert config.reach == 64 + 64 * 15
    assert [final_span(config, n) for n in (1, 1024, 1025, 6000)] == [1, 1024, 1024, 1024]


@pytest.mark.parametrize("max_model_len", [1, 64, 65, 500, 6000])
def test_every_span_has_a_bucket(max_model_len):
    config = settle({"num_sub_caches": 4, "cache_tokens": 256}, max_model_len)
    buckets = span_buckets(config)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == min(max_model_len, config.reach)


def test_the_last_sampled_token_is_never_computed():
    assert computed_tokens(10, 5) == 14
    assert computed_tokens(10, 1) == 10
    assert computed_tokens(10, 0) == 10


def test_the_startup_line_is_one_line_with_all_bytes():
    config = settle({})
    line = startup_line(config, max_blocks=7, page_size_bytes=1000, num_layers=3)
    assert "\n" not in line
    for words in (f"cache_tokens={config.cache_tokens}", "reach=", "7 blocks", "21000 bytes"):
        assert words in line


def test_accounting_loads_without_torch_and_vllm():
    code = (
        "import sys; sys.modules.update(torch=None, vllm=None); "
        "import vllm_cascade.structure.accounting"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
