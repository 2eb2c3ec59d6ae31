"""What the GPU benchmarks hold against device counters, and that they refuse to report."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from engine import serving
from layer.driver import Driver, Inputs, check_against_oracle, make_config
from records import Counts, RefusalError, percentiles, predict
from reference.cascade import Cascade, CascadeParameters
from vllm_cascade.attention.gpu_layer import GpuLayer
from vllm_cascade.attention.gpu_workspace import Shape
from vllm_cascade.kernels.merge.groups import merge_groups
from vllm_cascade.structure.layout import build_layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = Shape(4, 2, 16, torch.float32)
SMALL = {
    "cache_tokens": 128,
    "num_sub_caches": 2,
    "stride": 64,
    "num_sink_tokens": 16,
    "selection_window": 32,
}


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        {**SMALL, "policy": "blend"},
        {**SMALL, "policy": "blend", "cache_tokens": 208, "num_sub_caches": 4},
        SMALL
        | {"policy": "paper", "selection_window": 2, "cache_tokens": 208, "num_sub_caches": 3},
    ],
    ids=["no-scores", "2", "4", "unaligned"],
)
def test_prediction_equals_the_reference(options: dict[str, Any]) -> None:
    """Counted token by token from the reference's own lists of kept tokens."""
    config, heads, tokens = make_config(1000, **options), 3, 970
    parameters, cascade = CascadeParameters.like(config), Cascade(config, heads)
    pairs = dropped = 0

    def keep_newer(sub_cache: int, windows: torch.Tensor) -> torch.Tensor:
        nonlocal dropped
        dropped += windows.numel() // 2
        half = windows.shape[-1] // 2
        return (torch.arange(windows.shape[-1]) >= half).expand(windows.shape)

    for start, end, number in parameters.segments(tokens):
        before = cascade.kept.shape[1]
        pairs += sum(heads * (before + token - start + 1) for token in range(start, end))
        if end == parameters.boundary_token(number):
            cascade.finish_stride(range(start, end), keep_newer)
    found = predict(build_layout(config), [(0, 333), (333, 334), (334, tokens)], heads)
    assert (found.pairs, found.dropped) == (pairs * config.needs_scores, dropped)
    assert dropped and found.groups * config.group_tokens // 2 == dropped


def test_nothing_is_counted_where_nothing_is_chosen() -> None:
    layout = build_layout(make_config(1000, policy="window", cache_tokens=128, stride=64))
    assert predict(layout, [(0, 900)], 2) == Counts(0, 0, 0)


@pytest.mark.parametrize("policy", ["distinct", "blend"])
def test_device_counts_what_is_predicted(policy: str) -> None:
    """Random cuts of two requests, several boundaries in a chunk, and single tokens."""
    draw, config = random.Random(5), make_config(700, policy=policy, **SMALL)
    driver = Driver(config, SHAPE, 512, 2, DEVICE)
    driver.workspace.counters.zero_()
    done, steps = [0, 0], []
    while min(done) < 300:
        spans = []
        for request in range(2):
            end = min(done[request] + draw.choice([1, 40, 150]), 300)
            if end > done[request]:
                spans.append((request, done[request], end))
                done[request] = end
        inputs = Inputs.random(SHAPE, sum(end - start for _, start, end in spans), DEVICE)
        step = driver.step(*spans)
        driver.forward(driver.plan(step), *inputs.rows(0, len(inputs.query)))
        steps.append(step)
    predicted = driver.predicted(*steps)
    assert predicted.groups
    assert bool(predicted.pairs) == config.needs_scores
    predicted.check(driver.counted(), "random cuts")
    with pytest.raises(RefusalError, match="by the layout"):
        driver.predicted(*steps[:-1]).check(driver.counted(), "one step less")


def test_layer_is_compared_with_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_oracle(SHAPE, 340, 6, DEVICE, **SMALL)

    def without_values(
        pages: Any, merges: Any, size: int, window: int, weights: Any, *more: Any, **named: Any
    ) -> None:
        weights = weights._replace(value=0.0)
        merge_groups(pages, merges, size, window, weights, *more, **named)

    monkeypatch.setattr("vllm_cascade.kernels.merge.groups.merge_groups", without_values)
    with pytest.raises(RefusalError, match="windows kept other tokens"):
        check_against_oracle(SHAPE, 340, 6, DEVICE, **SMALL)


def test_output_is_compared_with_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GpuLayer.forward

    def off_by_a_little(layer: Any, query: Any, *others: Any) -> None:
        forward(layer, query, *others)
        others[-1].mul_(1 + 2e-6)

    monkeypatch.setattr(GpuLayer, "forward", off_by_a_little)
    with pytest.raises(RefusalError, match="output differs"):
        check_against_oracle(SHAPE, 340, 6, DEVICE, policy="blend", **SMALL)


def test_waves_that_attend_at_once_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, merge = GpuLayer._attend_rows, GpuLayer._prepare

    def off(layer: Any, each: Any, rows: Any, output: torch.Tensor) -> torch.Tensor:
        lse = attend(layer, each, rows, output)
        output.mul_(1 + 1e-4 * (len(each.launches) > 1))
        return lse

    def without_merges(layer: Any, query: Any, key: Any, value: Any, pages: Any, each: Any, *rows):
        if len(each.launches) > 1:
            launches = tuple(dataclasses.replace(one, merges=None) for one in each.launches)
            each = dataclasses.replace(each, launches=launches)
        merge(layer, query, key, value, pages, each, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(GpuLayer, "_attend_rows", off)
        with pytest.raises(RefusalError, match="several epochs in a step, output differs"):
            check_against_oracle(SHAPE, 340, 6, DEVICE, **SMALL)
    monkeypatch.setattr(GpuLayer, "_prepare", without_merges)
    with pytest.raises(RefusalError, match="several epochs keep other tokens"):
        check_against_oracle(SHAPE, 340, 6, DEVICE, **SMALL)


def test_engine_counts_what_is_predicted() -> None:
    """Every layer and KV head counts; the last token that is generated is never computed."""
    config = make_config(1000, policy="blend", **SMALL)
    case = serving.Case(3, 300, 20, 1, 1.0, 1.0)
    counts = predict(build_layout(config), [(0, 319)], 2).times(3 * 5)
    probe = {"config": dataclasses.asdict(config), "layers": 5, "num_kv_heads": 2}
    probe["counters"] = [counts.pairs, counts.groups, counts.dropped]
    assert str(counts.pairs) in serving.check_counters(probe, case, has_gpu=True)
    probe["counters"][1] -= 1
    with pytest.raises(RefusalError, match="by the layout"):
        serving.check_counters(probe, case, has_gpu=True)
    probe["counters"] = []
    with pytest.raises(RefusalError, match="no device counters"):
        serving.check_counters(probe, case, has_gpu=True)


def test_probe_reads_each_workspace_once() -> None:
    config = make_config(1000, **SMALL)
    spaces = [SimpleNamespace(counters=torch.tensor([7, 7, 7])) for _ in range(2)]

    class CascadeImpl:
        num_kv_heads = 2

        def __init__(self, space: SimpleNamespace) -> None:
            self.config, self.worker = config, SimpleNamespace(workspace=space)

    layers = {str(i): SimpleNamespace(impl=CascadeImpl(spaces[i % 2])) for i in range(6)}
    layers["other"] = SimpleNamespace(impl=object())
    mode = SimpleNamespace(name="FULL_DECODE_ONLY")
    worker = serving.Probe()
    worker.model_runner = object()
    worker.vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers, cudagraph_mode=mode)
    )
    worker.cascade_probe_start()
    for space in spaces:
        space.counters += torch.tensor([1, 2, 3])
    found = worker.cascade_probe_read()
    assert found["counters"] == [2, 4, 6]
    assert (found["layers"], found["cudagraph_mode"]) == (6, "FULL_DECODE_ONLY")
    assert json.loads(json.dumps(found))["config"] == dataclasses.asdict(config)


def test_a_side_without_a_result_refuses_the_row() -> None:
    case = serving.CASES["throughput"]
    with pytest.raises(RefusalError, match="FLASH_ATTN: did not end"):
        serving.rows_of("throughput", case, {"FLASH_ATTN": {"refused": "did not end"}})


def test_percentiles() -> None:
    assert percentiles([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
