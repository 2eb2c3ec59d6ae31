"""One layer through the GPU's planner and kernels against the oracle run stride by stride."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Hashable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from layers import DEVICE, HEAD, KV_HEADS, POLICIES, SHARED, GpuEngine, config_of, oracle, play
from vllm_cascade.kernels.launch import launch

# Of each query head; below, among and above the logits of keys.
SINKS = torch.tensor([-3.0, 0.5, 2.0, 40.0, -60.0, 4.0])


# Long chunks cross many boundaries in one step, short ones mix prefill with decode. The second is
# the only one of four sub-caches: the interpreter takes seconds for a step. `blend` as it is by
# default is in the test of a layer that repeats.
LONG, SHORT = 500, 40
CASES = [
    pytest.param(options, longest_cut, id="-".join(map(str, (*options.values(), longest_cut))))
    for options, longest_cut in zip(
        POLICIES, (LONG, LONG, None, LONG, LONG, SHORT, SHORT), strict=True
    )
    if longest_cut
]


@pytest.mark.parametrize(("options", "longest_cut"), CASES)
def test_layer_equals_oracle(options: dict, longest_cut: int) -> None:
    is_small = options != POLICIES[1]
    cache_tokens = 96 if "structure" in options else 64
    small = {"cache_tokens": cache_tokens, "num_sub_caches": 2} if is_small else {}
    config = config_of(500, **(small | options))
    # With two boundaries at least that merge.
    lengths = [500, 31, 230] if not small else [300, 31, 200] if longest_cut == LONG else [240, 31]
    outputs, kept, (q, k, v) = play(
        GpuEngine, config, lengths, longest_cut, seed=len(str(options)) + longest_cut
    )
    for r in range(len(lengths)):
        expected, boundaries = oracle(config, q[r], k[r], v[r])
        torch.testing.assert_close(outputs[r], expected.float(), rtol=2e-4, atol=2e-5)
        for end in kept[r].keys() & boundaries.keys():
            if end < config.max_model_len:
                assert torch.equal(kept[r][end].long(), boundaries[end]), (r, end)


@pytest.mark.parametrize("soft_cap", [0.0, 1.0])
def test_a_layer_that_repeats_what_another_launched(soft_cap: float) -> None:
    """Chunks whose rows lie apart, single tokens and boundaries, and sinks of its own.

    Sinks are in outputs and in scores: what they take of the softmax changes what is kept.
    """
    config = config_of(500, policy="blend", selection_window=64, cache_tokens=64, num_sub_caches=2)
    # Two of them end with a boundary.
    lengths = [config.num_sink_tokens + n * config.stride for n in (3, 0, 2)]
    lengths[1] -= 1
    engine_of = partial(GpuEngine, sinks=SINKS, follows=True, soft_cap=soft_cap)
    outputs, kept, (q, k, v) = play(engine_of, config, lengths, 90, seed=4)
    for r, last in enumerate(lengths):
        expected, boundaries = oracle(config, q[r], k[r], v[r], SINKS, soft_cap)
        torch.testing.assert_close(outputs[r], expected.float(), rtol=2e-4, atol=2e-5)
        if soft_cap:
            plain, _ = oracle(config, q[r], k[r], v[r], SINKS)
            assert (plain - expected).abs().max() > 0.1
        if r != 1:
            assert torch.equal(kept[r][last].long(), boundaries[last])
            assert not torch.equal(oracle(config, q[r], k[r], v[r])[1][last], boundaries[last])


def test_drafts_across_boundaries() -> None:
    """Rows of four tokens, of which drafts are rejected that were other tokens, or late.

    The second request's prompt is short enough to be resolved on the device.
    """
    config = config_of(
        500, policy="distinct", selection_window=64, cache_tokens=64, num_sub_caches=2
    )
    torch.manual_seed(0)
    draw, most, prompts = random.Random(0), 4, [2 * config.stride + config.num_sink_tokens - 5, 3]
    lengths = [prompts[0] + 12, 12]
    q, k, v = (
        [torch.randn(n + most, heads, HEAD) for n in lengths]
        for heads in (KV_HEADS * SHARED, KV_HEADS, KV_HEADS)
    )
    engine = GpuEngine(config, 2, torch.float32, most_tokens=most)
    done, outputs = [0, 0], [torch.zeros(n, KV_HEADS * SHARED, HEAD) for n in lengths]
    kept, num_late = {}, 0
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        spans, accepted = [], []
        for r, (start, end) in enumerate(zip(done, lengths, strict=True)):
            if start == end:
                continue
            together = min(most, engine.layout.most_together(start, start))
            length, right = most, draw.randint(1, together)
            if not start:
                length = right = together = prompts[r]
            num_late += length - together
            spans.append((r, start, start + length))
            accepted.append(min(right, end - start))
        inputs = [[each.clone() for each in x] for x in (q, k, v)]
        for (r, start, end), right in zip(spans, accepted, strict=True):
            for each in inputs:
                each[r][start + right : end] = torch.randn_like(each[r][start + right : end])
        out, first = engine.step(spans, *inputs), 0
        for (r, start, end), right in zip(spans, accepted, strict=True):
            outputs[r][start : start + right] = out[first : first + right]
            first += end - start
            done[r] = start + right
            kept[r, done[r]] = engine.kept(r, done[r])
    assert num_late
    merged = 0
    for r, n in enumerate(lengths):
        expected, boundaries = oracle(config, q[r][:n], k[r][:n], v[r][:n])
        torch.testing.assert_close(outputs[r], expected.float(), rtol=2e-4, atol=2e-5)
        for end in {end for owner, end in kept if owner == r} & boundaries.keys():
            assert torch.equal(kept[r, end].long(), boundaries[end])
            merged += boundaries[end].shape[1] < end
    assert merged


def test_a_draft_model_keeps_what_the_model_keeps() -> None:
    """It is given the model's tokens and the sampled one, then drafts, some of them wrong."""
    config = config_of(
        500, policy="distinct", selection_window=64, cache_tokens=64, num_sub_caches=2
    )
    torch.manual_seed(0)
    draw, most = random.Random(0), 4
    prompt = 2 * config.stride + config.num_sink_tokens - 5
    length = prompt + config.stride + 12
    inputs = [
        torch.randn(length + 2 * most, heads, HEAD, device=DEVICE)
        for heads in (KV_HEADS * SHARED, KV_HEADS, KV_HEADS)
    ]
    engine = GpuEngine(config, 1, torch.float32, most_tokens=most)
    blocks = torch.from_numpy(engine.table).to(DEVICE)
    expected, boundaries = oracle(config, *(each[:length].cpu() for each in inputs))

    def counts(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)

    def compute(step: Any, start: int, end: int, num_right: int) -> torch.Tensor:
        """Outputs of tokens start .. end - 1, of which the last are others than the text's."""
        parts = [each[start:end].clone() for each in inputs]
        for each in parts:
            each[num_right:] = torch.randn_like(each[num_right:])
        output = torch.full_like(parts[0], float("nan"))
        engine.layer.forward(*parts, engine.pages, step, output)
        return output.cpu()

    done, kept, num_merged = 0, {}, 0
    while done < length - 1:
        tokens = most if done else prompt
        together = min(tokens, engine.layout.most_together(done, done)) if done else tokens
        right = min(draw.randint(1, together), length - 1 - done) if done else tokens
        # The sampled token comes behind those that are right; what follows is of no use.
        end = done + tokens
        starts = np.array([0, tokens + 1], dtype=np.int32)
        step = engine.planner.plan(
            counts(*starts), starts, counts(end + 1), np.array([end]), blocks, with_sampled=True
        )
        out = compute(step, done, end + 1, right + 1)
        known = slice(done, done + right + 1)
        torch.testing.assert_close(out[: right + 1], expected[known].float(), rtol=2e-4, atol=2e-5)
        done += right
        kept[done] = engine.kept(0, done)
        for ahead in range(2, most + 1):
            step = engine.planner.plan_draft(counts(0, 1), counts(done + ahead), blocks, ahead)
            compute(step, done + ahead - 1, done + ahead, draw.randint(0, 1))
    for end in kept.keys() & boundaries.keys():
        assert torch.equal(kept[end].long(), boundaries[end])
        num_merged += boundaries[end].shape[1] < end
    assert num_merged


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("policy", "seed", "sinks", "soft_cap"),
    [
        ("distinct", 0, None, 0.0),
        ("blend", 1, None, 0.0),
        ("distinct", 2, SINKS, 0.0),
        ("blend", 3, SINKS, 0.0),
        ("distinct", 4, None, 2.0),
        ("blend", 5, None, 2.0),
    ],
)
def test_long_mixed_batches(
    dtype: torch.dtype, policy: str, seed: int, sinks: torch.Tensor | None, soft_cap: float
) -> None:
    """Some 200 steps of prefill and decode in any mixture, many boundaries in one step."""
    config = config_of(1500, policy=policy, selection_window=64)
    lengths = [1500, 900, 31, 320, 433, 1300]
    engine_of = partial(GpuEngine, sinks=sinks, follows=seed > 0, soft_cap=soft_cap)
    outputs, kept, (q, k, v) = play(engine_of, config, lengths, 60, seed=seed, dtype=dtype)
    unit = torch.finfo(dtype).eps
    for r in range(len(lengths)):
        expected, boundaries = oracle(config, q[r], k[r], v[r], sinks, soft_cap)
        assert outputs[r].isfinite().all()
        last = lengths[r]
        if dtype == torch.float32:
            for end in kept[r].keys() & boundaries.keys():
                if end < config.max_model_len:
                    assert torch.equal(kept[r][end].long(), boundaries[end]), (r, end)
        else:
            # Rotated keys are rounded: where two tokens are nearly equal the other one is kept,
            # and from there on other tokens are attended to.
            last = min(last, config.num_sink_tokens + config.cache_tokens)
        error = (outputs[r].double() - expected).abs()[:last]
        bound = expected.abs()[:last] * unit + v[r].abs().max().double() * 8 * unit + 1e-4
        assert (error <= bound).all(), (r, error.max())


def test_layers_share_a_workspace_as_long_as_one_of_them_lives() -> None:
    from vllm_cascade.attention.gpu_workspace import Shape, shared_workspace

    config = config_of(500, policy="blend", selection_window=64)
    shape = Shape(KV_HEADS * SHARED, KV_HEADS, HEAD, torch.float32)
    first = shared_workspace(config, shape, 64, 2, DEVICE)
    assert shared_workspace(config, shape, 64, 2, DEVICE) is first
    assert shared_workspace(config, shape, 64, 3, DEVICE) is not first
    first.counters.fill_(7)
    del first
    gc.collect()
    assert shared_workspace(config, shape, 64, 2, DEVICE).counters.sum() == 0


def variant(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Hashable:
    """All that Triton compiles a variant of a kernel for."""
    unspecialized = set(kernel.kwargs["do_not_specialize"] or ())
    unaligned = set(kernel.kwargs["do_not_specialize_on_alignment"] or ())
    kinds: list[Hashable] = []
    for name, arg in zip(kernel.arg_names, args, strict=False):
        if isinstance(arg, torch.Tensor):
            kinds.append((arg.dtype, name not in unaligned and arg.data_ptr() % 16 == 0))
        elif type(arg) is int and name not in unspecialized:
            kinds.append((arg == 1, name not in unaligned and arg % 16 == 0))
        else:
            kinds.append(type(arg))
    return kernel.__name__, *zip(kernel.arg_names, kinds, strict=False), *meta.items()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_graphs.py asks Triton")
@pytest.mark.parametrize("trace_tokens", [False, True])
@pytest.mark.parametrize("options", POLICIES[:3] + POLICIES[-1:])
def test_vllms_warm_up_compiles_all_variants(
    monkeypatch: pytest.MonkeyPatch, options: dict, trace_tokens: bool
) -> None:
    """Else a request waits for Triton: prompts of two tokens, single tokens, both in one step."""
    launched: set[Hashable] = set()

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launched.add(variant(kernel, args, meta))

    engine = GpuEngine(config_of(500, **options, trace_tokens=trace_tokens), 3, torch.float32)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm_cascade.kernels.") and getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", note)
    tokens = torch.zeros(3, 500, (SHARED + 2) * KV_HEADS, HEAD)
    inputs = tokens.split([SHARED * KV_HEADS, KV_HEADS, KV_HEADS], dim=2)
    for spans in (
        [(r, 0, 2) for r in range(3)],
        [(r, 2, 3) for r in range(3)],
        [(0, 0, 2)],
        [(0, 2, 3), (1, 0, 15)],
    ):
        engine.step(spans, *inputs)
    warm = launched.copy()
    draw = random.Random(0)
    for _ in range(300):
        starts = [draw.randrange(499) for _ in range(3)]
        spans = [
            (r, n, draw.choice([n + 1, draw.randint(n + 1, 500)])) for r, n in enumerate(starts)
        ]
        engine.step(draw.sample(spans, draw.randint(1, 3)), *inputs)
    assert len({name for name, *_ in warm}) >= 6
    assert launched == warm
