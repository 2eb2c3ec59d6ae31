"""Pages in FP8: what keys and values lose on the way in, and that nothing else is lost."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from layers import HEAD, KV_HEADS, SHARED, CpuEngine, GpuEngine, Pool, config_of, oracle, play
from reference import paged_decode
from reference.fp8 import round_trip, stored
from vllm_cascade.kernels import kv_write
from vllm_cascade.kernels.cpu import merge as cpu_merge
from vllm_cascade.kernels.decode import attend
from vllm_cascade.kernels.merge import groups as compaction
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.segments import DecodeRows, Merges
from vllm_cascade.kernels.weights import Weights

FP8 = torch.float8_e4m3fn
# Of each KV head, no powers of two: to keys as they are drawn here, some numbers are too large.
SCALES = (torch.tensor([0.03, 0.0071]), torch.tensor([0.011, 0.9]))
# Of a whole tensor: one number in memory for all heads.
TENSOR_SCALES = (torch.tensor(0.013).expand(KV_HEADS), torch.tensor(0.3).expand(KV_HEADS))


def same(got: Tensor, expected: Tensor) -> bool:
    """Equal numbers; FP8 has a negative zero, which is as good as zero."""
    return torch.equal(got.float().cpu(), expected.float().cpu())


def all_of_fp8() -> Tensor:
    """Every finite number of FP8, the middle between any two neighbours, and what lies next to
    these, both signs; beyond them some that are too large."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    edges = torch.cat([numbers, middles])
    near = [torch.nextafter(edges, torch.full_like(edges, to)) for to in (0.0, 1e9)]
    positive = torch.cat([edges, *near, torch.tensor([449.0, 465.0, 1e9, float("inf"), 1e-30])])
    return torch.cat([positive, -positive])


@pytest.mark.parametrize("scales", [SCALES, TENSOR_SCALES], ids=["head", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_written_as_pytorch_rounds(
    dtype: torch.dtype, scales: tuple[Tensor, Tensor], device: torch.device
) -> None:
    numbers = all_of_fp8()
    if dtype == torch.float32:
        # What the scale of a head divides back into numbers and middles.
        numbers = torch.cat([numbers, numbers * scales[0][0], numbers * scales[1][1]])
    tokens = -(-len(numbers) // 64)
    numbers = torch.nn.functional.pad(numbers, (0, tokens * 64 - len(numbers)))
    key = numbers.view(tokens, 1, 64).repeat(1, KV_HEADS, 1).to(device, dtype)
    value = -key.flip(0)
    pool = torch.full((tokens, KV_HEADS, 16, 128), 255, dtype=torch.uint8, device=device)
    pages = Pages(pool.view(FP8), None, None, *(scale.to(device) for scale in scales))
    rows = torch.arange(tokens, dtype=torch.int32, device=device)
    kv_write.write(pages, key, value, rows, 16 * rows.long() + 3, None)
    assert same(pages.kv[:, :, 3, :64], stored(key.cpu(), scales[0]))
    assert same(pages.kv[:, :, 3, 64:], stored(value.cpu(), scales[1]))
    rest = torch.arange(16, device=device) != 3
    assert (pool[:, :, rest] == 255).all()
    # On a CPU likewise.
    host = Pages(torch.zeros(tokens, KV_HEADS, 16, 128).to(FP8), None, None, *scales)
    ids = torch.arange(tokens)
    host.write(key.cpu(), value.cpu(), ids, torch.full((tokens,), 3), None)
    assert same(host.kv[:, :, 3], pages.kv[:, :, 3])


def test_scales_and_pages_fit_each_other() -> None:
    kv = torch.zeros(2, KV_HEADS, 16, 128)
    with pytest.raises(ValueError, match="float32 have no scales"):
        Pages(kv, None, None, *SCALES)
    key, value = SCALES
    for wrong in ((None, None), (key, None), (key[:1], value), (key, value.double())):
        with pytest.raises(ValueError, match=r"need scales \[2\] of float32"):
            Pages(kv.to(FP8), None, None, *wrong)


POLICIES = [
    pytest.param({"policy": "distinct", "selection_window": 64}, 500, id="distinct-long"),
    pytest.param({"policy": "distinct", "selection_window": 64}, 40, id="distinct-short"),
    pytest.param({"policy": "window", "num_sub_caches": 1}, 100, id="window"),
    pytest.param({"policy": "blend", "selection_window": 64}, 100, id="blend"),
]


@pytest.mark.parametrize(("options", "longest_cut"), POLICIES)
def test_layer_equals_oracle_of_round_trips(options: dict, longest_cut: int) -> None:
    """Whatever the cut, a token is used as it can be read back: by its own step too."""
    config = config_of(500, **{"cache_tokens": 64, "num_sub_caches": 2} | options)
    lengths = [300, 31, 200] if longest_cut == 500 else [200, 31]
    engine_of = partial(GpuEngine, scales=SCALES, follows=longest_cut == 100)
    found, kept, (q, k, v) = play(engine_of, config, lengths, longest_cut, seed=longest_cut)
    check(config, found, kept, q, k, v)
    assert any(stored(x, SCALES[0]).float().abs().max() == 448 for x in k)


@pytest.mark.parametrize("longest_cut", [1500, 40])
def test_layer_on_a_cpu_equals_oracle_of_round_trips(longest_cut: int) -> None:
    config = config_of(1500, policy="distinct", selection_window=64)
    engine_of = partial(CpuEngine, scales=SCALES)
    found, kept, (q, k, v) = play(engine_of, config, [1500, 900, 31, 433], longest_cut, seed=5)
    check(config, found, kept, q, k, v)


def check(config, outputs, kept, q, k, v) -> None:
    for r in range(len(q)):
        used = round_trip(k[r], SCALES[0]), round_trip(v[r], SCALES[1])
        expected, boundaries = oracle(config, q[r], *used)
        torch.testing.assert_close(outputs[r], expected.float(), rtol=2e-4, atol=2e-5)
        # The round trip is large beside what is allowed.
        plain, _ = oracle(config, q[r], k[r], v[r])
        assert (plain - expected).abs().max() > 1e-2
        compared = [end for end in kept[r].keys() & boundaries.keys() if end < config.max_model_len]
        for end in compared:
            assert torch.equal(kept[r][end].long(), boundaries[end]), (r, end)


def test_a_prompt_may_be_cut_anywhere() -> None:
    """A token that its own step has computed is used as later steps find it."""
    config = config_of(500, policy="distinct", selection_window=64)
    torch.manual_seed(7)
    shapes = ((2, 50, KV_HEADS * SHARED, HEAD), (2, 50, KV_HEADS, HEAD), (2, 50, KV_HEADS, HEAD))
    inputs = [torch.randn(shape) for shape in shapes]
    for x in inputs:
        x[1] = x[0]
    engine = GpuEngine(config, 2, torch.float32, scales=SCALES)
    whole = engine.step([(0, 0, 50)], *inputs)
    parts = [engine.step([(1, *span)], *inputs) for span in ((0, 23), (23, 24), (24, 50))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    first, second = (held(engine, 50, request).view(torch.uint8) for request in range(2))
    assert torch.equal(first, second)
    # What is lost on the way in is large beside that.
    plain = GpuEngine(config, 1, torch.float32).step([(0, 0, 50)], *inputs)
    assert (plain - whole).abs().max() > 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_long_mixed_batches(dtype: torch.dtype) -> None:
    """What is held does not depend on the cut by a bit; outputs are those of the oracle."""
    config = config_of(1500, policy="distinct", selection_window=64)
    lengths = [1500, 900, 31, 320, 433, 1300]
    found = []
    for longest_cut in (60, 700):
        engines = []

        def engine_of(*args: Any, engines: list[GpuEngine] = engines) -> GpuEngine:
            engines.append(GpuEngine(*args, scales=SCALES))
            return engines[0]

        outputs, kept, inputs = play(engine_of, config, lengths, longest_cut, seed=3, dtype=dtype)
        pages = [held(engines[0], n, r).view(torch.uint8) for r, n in enumerate(lengths)]
        found.append((outputs, kept, pages, inputs))
    (outputs, kept, pages, (q, k, v)), (_, other_kept, other_pages, _) = found
    unit = torch.finfo(dtype).eps
    for r, length in enumerate(lengths):
        assert torch.equal(pages[r], other_pages[r])
        for end in kept[r].keys() & other_kept[r].keys():
            assert torch.equal(kept[r][end], other_kept[r][end])
        used = round_trip(k[r], SCALES[0]), round_trip(v[r], SCALES[1])
        expected, _ = oracle(config, q[r], *used)
        # Beyond the budget near ties may be settled otherwise than in float64.
        last = min(length, config.num_sink_tokens + config.cache_tokens)
        error = (outputs[r].double() - expected).abs()[:last]
        largest = used[1].abs().max().double()
        bound = expected.abs()[:last] * unit + largest * 8 * unit + 1e-4
        assert (error <= bound).all(), (r, error.max())


def test_pages_are_the_same_on_gpu_and_cpu() -> None:
    """Every byte that is read again: keys, values and token indices, past several boundaries."""
    options = {"policy": "distinct", "selection_window": 64}
    config = config_of(500, **options, cache_tokens=64, num_sub_caches=2)
    found = {}
    for engine_type in (GpuEngine, CpuEngine):
        engine = None

        def engine_of(*args, engine_type=engine_type):
            nonlocal engine
            engine = engine_type(*args, scales=SCALES)
            return engine

        _, kept, _ = play(engine_of, config, [240], 200, seed=9)
        assert engine is not None
        found[engine_type] = held(engine, 240), kept
    (gpu, gpu_kept), (cpu, cpu_kept) = found[GpuEngine], found[CpuEngine]
    assert same(gpu, cpu)
    assert all(torch.equal(gpu_kept[0][end], cpu_kept[0][end]) for end in cpu_kept[0])


def held(pool: Pool, num_tokens: int, request: int = 0) -> Tensor:
    """[KV_HEADS, kept, 2 * HEAD] FP8 numbers of a request, in logical order."""
    entries, places = pool.layout.held(num_tokens)
    blocks = torch.from_numpy(pool.table[request][entries]).long().to(pool.pages.kv.device)
    return pool.pages.kv[blocks].transpose(0, 1).flatten(1, 2)[:, :places]


# Triton's interpreter multiplies the bits of bfloat16 as integers.
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("by_place", "soft_cap"),
    [(False, 0.0), (True, 0.0), (False, 0.5)],
    ids=["composed", "by_place", "capped"],
)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "rotary_dim", "is_neox", "dtype"),
    [
        (4, 2, 64, 64, True, torch.float32),
        (16, 1, 96, 96, True, torch.float32),
        (4, 2, 80, 32, False, torch.float32),
        (4, 2, 64, 64, False, torch.float16),
        (6, 3, 128, 128, True, torch.float16),
        (5, 1, 256, 64, True, torch.float16),
        (8, 1, 512, 512, True, torch.float16),
        *(
            pytest.param(8, 2, size, size, True, torch.bfloat16, marks=on_gpu)
            for size in (64, 80, 96, 128, 256, 512)
        ),
    ],
)
def test_decode_is_as_exact_as_eager_pytorch(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    rotary_dim: int,
    is_neox: bool,
    dtype: torch.dtype,
    by_place: bool,
    soft_cap: float,
    device: torch.device,
) -> None:
    torch.manual_seed(1)
    places, block_size = (0, 15, -1, 16, 130, 257), 16
    heads = torch.arange(1.0, num_kv_heads + 1)
    scales = [0.011 * heads, 0.3 / heads]
    table = torch.randperm(17 * len(places)).view(len(places), 17)
    raw = torch.full((table.numel(), num_kv_heads, block_size, 2 * head_size), float("nan")).to(FP8)
    for row, place in enumerate(places):
        at = torch.arange(place + 1)
        keys = stored(torch.randn(place + 1, num_kv_heads, head_size), scales[0])
        values = stored(torch.randn(place + 1, num_kv_heads, head_size), scales[1])
        raw[table[row, at // block_size], :, at % block_size] = torch.cat([keys, values], -1)
    # Heads of other sizes: none may cost another its precision.
    sizes = torch.logspace(-3, 0, num_heads)[:, None]
    query = (sizes * torch.randn(len(places) + 1, num_heads, head_size)).to(device, dtype)
    batch = DecodeRows(
        rows=torch.randperm(len(places)).int().to(device),
        places=torch.tensor(places, dtype=torch.int32, device=device),
        block_table=table.int().to(device),
        carry=torch.ones(len(places), device=device),
        weights=torch.ones(len(places), device=device),
    )
    half = rotary_dim // 2
    speed = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(max(places) + 1)[:, None] * speed
    cos, sin = angle.cos().float().to(device), angle.sin().float().to(device)

    def run(module: Any, pages: Pages, query: Tensor, **options: Any) -> Tensor:
        output = torch.full_like(query, float("nan"))
        given = (output, query, pages, batch, cos, sin, is_neox, head_size**-0.5, 1.0, "max")
        module.decode(*given, scored=False, **{"soft_cap": soft_cap, **options})
        return output.double()

    used = raw.double()
    used[..., :head_size] *= scales[0].double()[:, None, None]
    used[..., head_size:] *= scales[1].double()[:, None, None]
    used = used.to(device)
    exact = run(paged_decode, Pages(used, None, None), query.double(), scratch=None)
    if soft_cap:
        plain = run(paged_decode, Pages(used, None, None), query.double(), soft_cap=0.0)
        assert (plain - exact).nan_to_num(0).abs().max() > 0.02
    rounded = Pages(used.to(dtype), None, None)
    eager = run(paged_decode, rounded, query, scratch=None, dtype=dtype)
    scratch = attend.make_scratch(
        8, num_heads, num_kv_heads, head_size, 1, 300, 8, device, scored=False
    )
    scratch.partial.fill_(float("nan"))
    config = replace(
        attend.launch_config(6, num_kv_heads, head_size, 300, 1, not by_place),
        splits=4,
        min_keys=64,
    )
    pages = Pages(raw.to(device), None, None, *(scale.to(device) for scale in scales))
    found = run(attend, pages, query, scratch=scratch, config=config)
    written = batch.rows[batch.places >= 0].long()
    error = (found - exact)[written].abs().max()
    rounding = torch.finfo(dtype).eps / 2 * exact[written].abs().max()
    assert error <= 2 * (eager - exact)[written].abs().max() + rounding
    assert found.isnan().all(-1).all(-1).sum() == 2


@pytest.mark.parametrize("weights", [Weights(0, 1, 1), Weights(0, 0, 1)], ids=str)
def test_merges_move_bytes_as_on_a_cpu(weights: Weights, device: torch.device) -> None:
    """Vectors of one channel: what is rounded settles no tie."""
    torch.manual_seed(2)
    num_heads, block_size, head_size, window = 2, 16, 64, 64
    scales = (torch.tensor([0.5, 0.01]), torch.tensor([3.0, 0.2]))
    table = torch.randperm(26)[:20].view(2, 10)
    likely = torch.arange(1, head_size + 1).float().square()
    shape = (26, num_heads, block_size, 2)
    channel = likely.multinomial(math.prod(shape), True).view(shape)
    one = torch.nn.functional.one_hot(channel, head_size) * torch.randint(0, 9, (*shape, 1))
    before = one.flatten(3).float().to(FP8)
    tokens = torch.arange(math.prod(shape[:3]), dtype=torch.int32).view(shape[:3])
    gpu, host = (
        Pages(before.to(where, copy=True), None, tokens.to(where, copy=True), *given)
        for where, given in ((device, [s.to(device) for s in scales]), ("cpu", scales))
    )
    groups = torch.stack([table[:, 1:5], table[:, 5:9]], dim=1)
    counts = torch.tensor([2, 1], dtype=torch.int32)
    num_keys = torch.full((2,), 160, dtype=torch.int32)
    merges = Merges(*(x.int().to(device) for x in (groups, counts, table, num_keys)))
    scratch = compaction.make_scratch(2, num_heads, head_size, device)
    compaction.merge_groups(gpu, merges, head_size, window, weights, scratch)
    batch = cpu_merge.MergeBatch(
        torch.stack([groups[0, 0], groups[0, 1], groups[1, 0]]),
        torch.tensor([0, 0, 1]),
        list(table),
    )
    cpu_merge.merge_groups(host, batch, head_size, window, weights)
    assert torch.equal(gpu.kv.cpu().view(torch.uint8), host.kv.view(torch.uint8))
    assert gpu.token is not None and host.token is not None
    assert torch.equal(gpu.token.cpu(), host.token)
    assert not same(host.kv, before)
