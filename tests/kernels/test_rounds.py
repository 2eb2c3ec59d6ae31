"""Waves of a chunk that attend at once: which do, and that nothing but the order changes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from layers import DEVICE, HEAD, KV_HEADS, SHARED, GpuEngine, config_of, oracle
from vllm_cascade.attention.gpu_step import GpuMetadata, Planner
from vllm_cascade.attention.gpu_workspace import MOST_ROUND_BYTES, Shape, max_workspace_keys
from vllm_cascade.kernels.segments import KEY_PADDING
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

# Positions enough for Llama 3.1 8B as it is by default.
LLAMA_8B = {"block_size": 16, "max_model_len": 100_000, "position_limit": 1 << 17}


def plan(lengths: list[int], max_keys: int, **options: object) -> tuple[GpuMetadata, Planner]:
    """A step of prompts from their beginning."""
    layout = build_layout(config_of(2000, num_sub_caches=2, selection_window=64, **options))
    planner = Planner(layout, DEVICE, len(lengths), max_keys)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    ends = np.array(lengths, dtype=np.int32)
    table = torch.zeros(len(lengths), layout.max_blocks, dtype=torch.int32, device=DEVICE)
    counts = (torch.from_numpy(starts).to(DEVICE), starts, torch.from_numpy(ends).to(DEVICE), ends)
    return planner.plan(*counts, table), planner


def test_waves_take_rows_of_their_own() -> None:
    metadata, planner = plan([900, 700], max_keys=3000)
    waves = [list(planner.layout.segments(0, n)) for n in (900, 700)]
    num_waves = max(map(len, waves))
    assert sum(len(each.launches) for each in metadata.rounds) == num_waves
    assert any(len(each.launches) > 1 for each in metadata.rounds)
    rows = 0
    for each in metadata.rounds:
        spans = each.segments.key_spans.tolist()
        assert spans == [
            span for launch in each.launches for span in launch.segments.key_spans.tolist()
        ]
        assert spans[0][0] == 0
        assert all(a[1] + KEY_PADDING == b[0] for a, b in itertools.pairwise(spans))
        assert spans[-1][1] + KEY_PADDING == each.segments.num_rows <= 3000
        for segments in (each.segments, *(launch.segments for launch in each.launches)):
            own = [end - start for start, end in segments.query_spans.tolist()]
            held = [end - start for start, end in segments.key_spans.tolist()]
            assert segments.max_query_len == max(own)
            assert segments.max_key_len == max(held)
            before = [keys - queries for keys, queries in zip(held, own, strict=True)]
            assert segments.max_prefix_len == max(before)
        assert len(each.rows) == len(each.tokens) == each.segments.num_queries
        rows += each.segments.num_queries
    assert rows == 1600


def test_what_keeps_a_wave_alone() -> None:
    """Scores, which a boundary needs; and a workspace for one."""
    together = plan([900], max_keys=3000)[0]
    assert max(len(each.launches) for each in together.rounds) > 1
    for alone in (
        plan([900], max_keys=3000, policy="blend"),
        plan([900], max_keys=10),
    ):
        assert {len(each.launches) for each in alone[0].rounds} == {1}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "caches"),
    # Llama 8B whole, a rank of two, four and eight; Qwen2.5 1.5B; 28 heads, cut at a limit; and
    # those of which two caches are above it.
    [(32, 8, 2), (16, 4, 2), (8, 2, 9), (4, 1, 9), (12, 2, 9), (28, 4, 7), (28, 28, 2)],
)
def test_room_for_a_steps_waves_where_one_leaves_the_device_idle(
    heads: int, kv_heads: int, caches: int
) -> None:
    config = resolve(CascadeOptions.parse({}), **LLAMA_8B)
    shape = Shape(heads, kv_heads, 128, torch.bfloat16)
    rows = max_workspace_keys(config, shape, 8192, 132)
    places = config.max_places + config.block_size + KEY_PADDING
    assert rows == caches * places
    if caches > 2:
        assert rows * 2 * kv_heads * 128 * 2 <= MOST_ROUND_BYTES
    # Where no request comes to a boundary a chunk is one wave.
    short = resolve(CascadeOptions.parse({}), **{**LLAMA_8B, "max_model_len": 8192})
    assert max_workspace_keys(short, shape, 8192, 132) == 2 * (8192 + 16 + KEY_PADDING)
    scored = resolve(CascadeOptions.parse({"policy": "blend"}), **LLAMA_8B)
    assert max_workspace_keys(scored, shape, 8192, 132) == 2 * (
        scored.max_places + scored.block_size + KEY_PADDING
    )


@pytest.mark.parametrize("structure", ["elastic", "fixed"])
def test_answers_and_kept_tokens_are_those_of_waves_alone(structure: str) -> None:
    """Two requests whose rows lie apart, with tokens enough for several boundaries in a step.

    The layer repeats what another has launched.
    """
    config = config_of(
        700,
        policy="distinct",
        structure=structure,
        cache_tokens=128,
        selection_window=64,
        num_sub_caches=2 if structure == "fixed" else "auto",
    )
    torch.manual_seed(0)
    lengths = [600, 420]
    q = [torch.randn(n, KV_HEADS * SHARED, HEAD) for n in lengths]
    k, v = ([torch.randn(n, KV_HEADS, HEAD) for n in lengths] for _ in range(2))
    steps = [[(0, 0, 350), (1, 0, 30)], [(1, 30, 420), (0, 350, 600)]]
    found = []
    for max_keys in (8000, 10):
        engine = GpuEngine(config, 2, torch.float32, follows=True, max_keys=max_keys)
        outputs = [engine.step(spans, q, k, v) for spans in steps]
        found.append((outputs, [engine.kept(r, n) for r, n in enumerate(lengths)]))
    (together, kept), (alone, kept_alone) = found
    for r in range(2):
        assert torch.equal(kept[r], kept_alone[r])
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    expected, _ = oracle(config, q[0], k[0], v[0])
    torch.testing.assert_close(
        torch.cat([together[0][:350], together[1][390:]]), expected.float(), rtol=2e-4, atol=2e-5
    )


def test_layers_with_other_query_heads_share_the_smaller_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are told one plan, whose rounds have to fit each of them."""
    from vllm_cascade.attention.builder import CascadeMetadataBuilder

    def layer(max_keys: int) -> SimpleNamespace:
        worker = SimpleNamespace(workspace=SimpleNamespace(max_keys=max_keys))
        impl = SimpleNamespace(worker=worker, seen=None)
        return SimpleNamespace(impl=impl)

    given = []
    monkeypatch.setattr("vllm_cascade.attention.gpu_step.Planner", lambda *args: given.append(args))
    layers = {"few": layer(7000), "many": layer(2000)}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        speculative_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        num_speculative_tokens=0,
    )
    spec = SimpleNamespace(config=config_of(700, num_sub_caches=2, selection_window=64))
    CascadeMetadataBuilder(spec, list(layers), config, torch.device("cuda"))
    assert given[0][3] == 2000
