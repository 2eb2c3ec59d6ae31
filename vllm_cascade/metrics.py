"""Prometheus metrics of a cascade, through vLLM's plug point for stat loggers.

vLLM loads the logger for every server, whatever the attention backend. Without CASCADE the logger
registers no metric.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_cascade.structure import accounting
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.support.resolved import resolve_options
from vllm_cascade.support.selection import selects_cascade

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import (
        FinishedRequestStats,
        IterationStats,
        MultiModalCacheStats,
        SchedulerStats,
    )

    from vllm_cascade.structure.config import CascadeConfig

Metric: TypeAlias = Gauge | Counter | Histogram

# Not "vllm:": vLLM unregisters every metric with that prefix.
PREFIX = "vllm_cascade:"
LABELS = ("model_name", "engine")


class CascadeStatLogger(AggregateStatLoggerBase):
    """Counts what finished requests have cost, from their token counts, by model and engine.

    Args:
        vllm_config: vLLM's complete configuration.
        engine_indexes: Engines that report to this process.
    """

    # Kept by the class: a registry takes a name once, and a process may start several servers, one
    # after another.
    _registered: tuple[Metric, ...] = ()

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.config: CascadeConfig | None = None
        if not selects_cascade(vllm_config.attention_config):
            return
        self.config = config = resolve_options(vllm_config)
        self._model_name = vllm_config.model_config.served_model_name
        for metric in CascadeStatLogger._registered:
            REGISTRY.unregister(metric)
        CascadeStatLogger._registered = ()
        budget = _gauge("budget_tokens", "Budget of the sub-caches in tokens, sinks not counted")
        reach = _gauge(
            "reach_tokens", "Tokens of text spanned, where each fixed sub-cache is just full"
        )
        blocks = _gauge("max_blocks_per_request", "Most KV blocks a request holds in a layer")
        self._past_budget = _counter(
            "requests_past_budget",
            "Finished requests of more computed tokens than sinks and sub-caches hold",
        )
        self._evicted = _counter(
            "tokens_evicted", "Tokens that finished requests no longer held, per layer and KV head"
        )
        self._boundaries = _counter("boundaries_run", "Rounds of moves that finished requests ran")
        self._span = Histogram(
            f"{PREFIX}request_span_tokens",
            "Tokens that a finished request's cache spanned at its end",
            LABELS,
            buckets=accounting.span_buckets(config),
        )
        counted = (self._past_budget, self._evicted, self._boundaries, self._span)
        CascadeStatLogger._registered = (budget, reach, blocks, *counted)
        for engine in engine_indexes:
            self._of(budget, engine).set(config.cache_tokens)
            self._of(reach, engine).set(config.reach)
            self._of(blocks, engine).set(build_layout(config).max_blocks)
            for metric in counted:
                self._of(metric, engine)  # so that zero is shown until the first request ends

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Count the requests that a step finished.

        Args:
            scheduler_stats: Not used.
            iteration_stats: The step as the front end saw it; None is ignored.
            mm_cache_stats: Not used.
            engine_idx: Number of the engine that ran the step.
        """
        if self.config is None or iteration_stats is None:
            return
        for request in iteration_stats.finished_requests:
            self._count(self.config, request, engine_idx)

    def log_engine_initialized(self) -> None:
        """Log nothing, because the backend logs a line of its own."""

    def _count(self, config: CascadeConfig, request: FinishedRequestStats, engine: int) -> None:
        num_tokens = accounting.computed_tokens(
            request.num_prompt_tokens, request.num_generation_tokens
        )
        past_budget = accounting.past_budget(config, num_tokens)
        self._of(self._past_budget, engine).inc(past_budget)
        self._of(self._evicted, engine).inc(accounting.tokens_evicted(config, num_tokens))
        # Cached tokens are those of an earlier request that this one went on from. The boundaries
        # up to there were counted when the earlier request ended.
        before = accounting.boundaries_run(config, request.num_cached_tokens)
        boundaries = accounting.boundaries_run(config, num_tokens)
        self._of(self._boundaries, engine).inc(max(0, boundaries - before))
        self._of(self._span, engine).observe(accounting.final_span(config, num_tokens))

    def _of(self, metric: Metric, engine: int) -> Any:
        return metric.labels(self._model_name, str(engine))


def _gauge(name: str, documentation: str) -> Gauge:
    # With several API servers each of them reports the same value.
    return Gauge(f"{PREFIX}{name}", documentation, LABELS, multiprocess_mode="mostrecent")


def _counter(name: str, documentation: str) -> Counter:
    return Counter(f"{PREFIX}{name}", documentation, LABELS)
