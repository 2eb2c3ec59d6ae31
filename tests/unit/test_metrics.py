"""Metrics of finished requests, on stand-ins for vLLM's configuration."""

from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

from vllm_cascade import metrics
from vllm_cascade.metrics import CascadeStatLogger
from vllm_cascade.structure import accounting
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

CONFIG = resolve(
    CascadeOptions.parse({"cache_tokens": 256, "num_sub_caches": 4, "newest_share": 0.0}),
    block_size=16,
    max_model_len=6000,
    position_limit=4096,
)


@pytest.fixture
def vllm_config(monkeypatch):
    monkeypatch.setattr(metrics, "resolve_options", lambda vllm_config: CONFIG)
    yield SimpleNamespace(
        attention_config=SimpleNamespace(backend="CASCADE", backend_per_kind={}),
        cache_config=SimpleNamespace(block_size=16),
        model_config=SimpleNamespace(served_model_name="model"),
    )
    for metric in CascadeStatLogger._registered:
        REGISTRY.unregister(metric)
    CascadeStatLogger._registered = ()


def finished(*requests):
    """A step that finished requests of these numbers of prompt and sampled tokens."""
    stats = IterationStats()
    stats.finished_requests = [
        FinishedRequestStats("stop", num_prompt_tokens=prompt, num_generation_tokens=sampled)
        for prompt, sampled in requests
    ]
    return stats


def read(name, engine=0, **labels):
    labels |= {"model_name": "model", "engine": str(engine)}
    return REGISTRY.get_sample_value(f"vllm_cascade:{name}", labels)


def test_the_structure_is_shown_from_the_start(vllm_config):
    CascadeStatLogger(vllm_config, [0, 1]).log_engine_initialized()
    for engine in (0, 1):
        assert read("budget_tokens", engine) == 256
        assert read("reach_tokens", engine) == CONFIG.reach == 64 + 64 * 15
        assert read("max_blocks_per_request", engine) == build_layout(CONFIG).max_blocks
        assert read("requests_past_budget_total", engine) == 0
        assert read("tokens_evicted_total", engine) == 0
        assert read("boundaries_run_total", engine) == 0
        assert read("request_span_tokens_count", engine) == 0


def test_finished_requests_are_counted(vllm_config):
    logger = CascadeStatLogger(vllm_config, [0, 1])
    logger.record(None, finished((300, 21), (100, 1)), engine_idx=1)
    assert read("requests_past_budget_total", 1) == 0
    logger.record(None, finished(), engine_idx=1)
    logger.record(None, None, engine_idx=1)
    logger.record(None, finished((300, 22), (5000, 1)), mm_cache_stats=None, engine_idx=1)
    assert read("requests_past_budget_total", 1) == 2
    evicted = 5000 - build_layout(CONFIG).held(5000)[1]
    assert evicted > 0
    assert accounting.tokens_evicted(CONFIG, 321) == 0
    assert read("tokens_evicted_total", 1) == evicted
    assert read("boundaries_run_total", 1) == accounting.boundaries_run(CONFIG, 5000)
    assert read("request_span_tokens_count", 1) == 4
    assert read("request_span_tokens_sum", 1) == 320 + 100 + 321 + 1024
    assert read("request_span_tokens_bucket", 1, le="128.0") == 1
    assert read("request_span_tokens_bucket", 1, le="512.0") == 3
    assert read("request_span_tokens_bucket", 1, le="1024.0") == 4
    assert read("request_span_tokens_count", 0) == 0


def test_boundaries_before_a_request_went_on_are_not_its_own(vllm_config):
    logger = CascadeStatLogger(vllm_config, [0])
    step = finished((5000, 1))
    step.finished_requests[0].num_cached_tokens = 4000
    logger.record(None, step)
    before, after = (accounting.boundaries_run(CONFIG, n) for n in (4000, 5000))
    assert read("boundaries_run_total") == after - before > 0


def test_a_second_server_in_a_process_starts_from_zero(vllm_config):
    CascadeStatLogger(vllm_config, [0]).record(None, finished((5000, 1)))
    unregister_vllm_metrics()  # as vLLM does next
    assert read("requests_past_budget_total") == 1
    CascadeStatLogger(vllm_config, [0])
    assert read("requests_past_budget_total") == 0


def test_without_cascade_there_is_nothing(vllm_config):
    vllm_config.attention_config.backend = None
    logger = CascadeStatLogger(vllm_config, [0])
    logger.record(None, finished((5000, 1)))
    logger.log_engine_initialized()
    logger.log()
    assert not [m.name for m in REGISTRY.collect() if m.name.startswith("vllm_cascade:")]


def test_vllm_finds_the_logger():
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    # By the name of the other entry points, so that one VLLM_PLUGINS admits all.
    assert "cascade" in entry_points(group="vllm.stat_logger_plugins").names
    assert CascadeStatLogger in load_stat_logger_plugin_factories()
