"""The best configuration that the options leave, for one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm_cascade.structure.config import (
    ELASTIC,
    CascadeConfig,
    Fault,
    Model,
    broken_rule,
    shares,
    spanned,
)
from vllm_cascade.structure.options import CascadeOptions

DEFAULT_CACHE_TOKENS = 16_384
DEFAULT_STRIDE = 1_024
# A shorter stride makes prefill slow; the search takes one only where no longer stride fits.
LEAST_DEFAULT_STRIDE = 256
DEFAULT_SINK_TOKENS = 64


def search(options: CascadeOptions, model: Model) -> CascadeConfig | list[Fault]:
    """Find the best valid configuration for `model`.

    Args:
        options: What the user set.
        model: The model, with a block size that is a power of two.

    Returns:
        The configuration; or, if none is valid, the first fault found in each field to blame, the
        fault of the best configuration first.
    """
    tried = strides(options, model)
    if options.stride is None:
        longer = [stride for stride in tried if stride >= LEAST_DEFAULT_STRIDE]
        found = _search(options, model, longer)
        if isinstance(found, CascadeConfig):
            return found
    return _search(options, model, tried)


def strides(options: CascadeOptions, model: Model) -> Sequence[int]:
    """List the strides to try.

    Args:
        options: What the user set.
        model: The model; only its block size counts.

    Returns:
        Strides in tokens, in ascending order; at least one.
    """
    if options.stride is not None:
        return [options.stride]
    group = _group(options, model)
    return range(group, DEFAULT_STRIDE + 1, group) or [group]


def _group(options: CascadeOptions, model: Model) -> int:
    return max(int(options.preset("selection_window")), 2 * model.block_size)


def _search(
    options: CascadeOptions, model: Model, tried: Sequence[int]
) -> CascadeConfig | list[Fault]:
    faults: dict[str, Fault] = {}
    for sinks, budget, sub_caches in _budgets(options, model):
        if isinstance(sub_caches, Fault):
            faults.setdefault(sub_caches.field, sub_caches)
            continue
        best = None
        for stride in tried:
            if best is not None and best.is_elastic and 4 * stride > budget:
                break  # a longer stride is as valid, but more would wait to merge
            config = _config(options, model, sinks, budget, sub_caches, stride)
            fault = broken_rule(config, model.position_limit)
            if fault is not None:
                faults.setdefault(fault.field, fault)
                break  # a longer stride breaks the same rule
            best = config
        if best is not None:
            return best
    return list(faults.values())


def _budgets(options: CascadeOptions, model: Model) -> Iterator[tuple[int, int, int | Fault]]:
    """Triples of sinks, `cache_tokens` and number of sub-caches to try, best first."""
    block = model.block_size
    sinks = options.num_sink_tokens
    if sinks is None:
        sinks = -(-DEFAULT_SINK_TOKENS // block) * block
    # Of an elastic structure, whole units count.
    step = _group(options, model) // 2 if options.preset("structure") == ELASTIC else block
    # A budget takes at least as many positions as it has tokens.
    largest = min(DEFAULT_CACHE_TOKENS, model.position_limit) // step * step or step
    budgets: Sequence[int] = range(largest, 0, -step)
    if options.cache_tokens is not None:
        budgets = [options.cache_tokens]
    for budget in budgets:
        yield sinks, budget, _sub_caches(options, model, sinks, budget)


def _sub_caches(options: CascadeOptions, model: Model, sinks: int, budget: int) -> int | Fault:
    if options.policy == "window":
        return 1
    if options.preset("structure") == ELASTIC:
        # A unit of the highest level has survivors of as much text as the longest request has.
        return max(2, (2 * model.max_model_len // _group(options, model)).bit_length())
    if options.num_sub_caches != "auto":
        return options.num_sub_caches
    block = model.block_size
    newest_share = float(options.preset("newest_share"))
    for number in range(1, budget // block + 1):
        newest, older = shares(budget // block, number, newest_share)
        if number > 1 and not older:
            break
        if sinks + block * spanned(newest, older, number) >= model.max_model_len:
            return number
    return Fault(
        "cache_tokens",
        budget,
        f"no number of sub-caches reaches {model.max_model_len} tokens from so small a budget "
        f"in blocks of {block}",
    )


def _config(
    options: CascadeOptions, model: Model, sinks: int, budget: int, sub_caches: int, stride: int
) -> CascadeConfig:
    return CascadeConfig(
        policy=options.policy,
        block_size=model.block_size,
        cache_tokens=budget,
        num_sub_caches=sub_caches,
        newest_share=float(options.preset("newest_share")),
        num_sink_tokens=sinks,
        stride=stride,
        selection_window=int(options.preset("selection_window")),
        score_weight=float(options.preset("score_weight")),
        key_weight=float(options.preset("key_weight")),
        value_weight=float(options.preset("value_weight")),
        score_power=float(options.preset("score_power")),
        score_reduction=str(options.preset("score_reduction")),
        score_decay=float(options.preset("score_decay")),
        trace_tokens=options.trace_tokens,
        max_model_len=model.max_model_len,
        structure=str(options.preset("structure")),
    )
