"""Time of paged decode, its launches side by side, against FlashAttention-3.

One attention layer of Llama-3.1-8B: 32 query heads, 8 KV heads, head size 128, bfloat16, blocks of
16 tokens in random order. Milliseconds are the median over replays of a CUDA graph; GB/s counts
every key and value read once. FlashAttention gets keys that are rotated already.

    python benchmarks tune.decode
    python benchmarks tune.decode --fp8   # keys and values in FP8 (e4m3)
    python benchmarks tune.decode --tiny  # in Triton's interpreter, no timings
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from layer.baselines import rotated

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_SIZE**-0.5


def median_ms(run: Callable[[], object], replays: int = 15) -> float:
    """Median time of `run` by itself, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    # Evicts what the last replay left in the L2 cache.
    other = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    for _ in range(replays):
        other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


class Case:
    """Rows of equal length over blocks in random order."""

    def __init__(
        self,
        num_rows: int,
        num_keys: int,
        dtype: torch.dtype,
        device: str,
        is_fp8: bool = False,
        heads: tuple[int, int] = (NUM_HEADS, NUM_KV_HEADS),
    ) -> None:
        from vllm_cascade.kernels.pages import Pages
        from vllm_cascade.kernels.segments import DecodeRows

        torch.manual_seed(0)
        self.num_rows, self.num_keys = num_rows, num_keys
        self.num_heads, self.num_kv_heads = heads
        per_row = -(-num_keys // BLOCK_SIZE)
        num_blocks = num_rows * per_row + 1
        channels = 2 * HEAD_SIZE
        slots = self.num_kv_heads * BLOCK_SIZE
        kept = torch.float8_e4m3fn if is_fp8 else dtype
        page = slots * channels + slots * 4 // kept.itemsize
        pool = torch.empty(num_blocks, page, dtype=kept, device=device)
        for some in pool.split(4096):
            some.copy_(torch.randn(some.shape, device=device))
        scales = [torch.ones(self.num_kv_heads, device=device) for _ in range(2 * is_fp8)]
        shape = (num_blocks, self.num_kv_heads, BLOCK_SIZE, channels)
        kv = pool.as_strided(shape, (page, BLOCK_SIZE * channels, channels, 1))
        self.pages = Pages.view(kv, True, False, *scales)
        assert self.pages.score is not None
        self.pages.score.zero_()
        table = torch.randperm(num_blocks, device=device)[: num_rows * per_row]
        self.batch = DecodeRows(
            rows=torch.arange(num_rows, dtype=torch.int32, device=device),
            places=torch.full((num_rows,), num_keys - 1, dtype=torch.int32, device=device),
            block_table=table.view(num_rows, per_row).int(),
            carry=torch.ones(num_rows, device=device),
            weights=torch.ones(num_rows, device=device),
        )
        self.query = torch.randn(num_rows, self.num_heads, HEAD_SIZE, device=device).to(dtype)
        self.output = torch.empty_like(self.query)
        speed = 500_000.0 ** -(torch.arange(HEAD_SIZE // 2, dtype=torch.float64) / (HEAD_SIZE // 2))
        angle = (torch.arange(num_keys)[:, None] * speed).to(device)
        self.cos, self.sin = angle.cos().float(), angle.sin().float()
        self.bytes = num_rows * num_keys * self.num_kv_heads * channels * kv.element_size()

    def tables(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos.to(dtype), self.sin.to(dtype)

    def error(self, rows: tuple[int, ...]) -> tuple[float, float]:
        """Largest errors of output and of scores (against the largest) on some rows, in fp32."""
        assert self.pages.score is not None
        worst, worst_score = 0.0, 0.0
        for r in rows:
            block = self.batch.block_table[r].long()
            # [num_kv_heads, num_keys, channels]
            held = self.pages.kv[block].transpose(0, 1).flatten(1, 2)[:, : self.num_keys].float()
            key = rotated(held[..., :HEAD_SIZE], self.cos, self.sin)
            query = rotated(self.query[r].float(), self.cos[-1], self.sin[-1])
            query = query.view(self.num_kv_heads, -1, HEAD_SIZE)
            probs = ((query @ key.transpose(1, 2)) * SCALE).softmax(-1)
            output = (probs @ held[..., HEAD_SIZE:]).view(self.num_heads, HEAD_SIZE)
            worst = max(worst, float((self.output[r].float() - output).abs().max()))
            score = self.pages.score[block].transpose(0, 1).flatten(1, 2)[:, : self.num_keys]
            best = probs.square().amax(1)
            worst_score = max(worst_score, float((score - best).abs().max() / best.max()))
        return worst, worst_score


def launches(case: Case, tiny: bool) -> Iterator[tuple[str, object, torch.dtype, bool]]:
    """Name, launch, dtype of the rotary table and whether to score, of every variant."""
    from vllm_cascade.kernels.decode.attend import launch_config

    element_size = case.pages.kv.element_size()
    base = launch_config(case.num_rows, NUM_KV_HEADS, HEAD_SIZE, case.num_keys, element_size, True)
    coarse = replace(base, by_place=True)
    half = torch.float16 if tiny else torch.bfloat16
    yield "default", base, torch.float32, True
    yield "default, no scores", base, torch.float32, False
    yield "by place", coarse, half, True
    if tiny:
        return
    for keys, warps, stages in (
        (32, 1, 3), (32, 2, 2), (32, 2, 4), (32, 4, 3), (32, 4, 4), (32, 4, 5), (64, 4, 2),
        (64, 4, 3), (64, 4, 4), (64, 8, 3), (64, 2, 2), (16, 1, 4), (128, 8, 2),
    ):  # fmt: skip
        yield (
            f"{keys} keys, {warps} warps, {stages} stages",
            replace(base, keys=keys, num_warps=warps, num_stages=stages),
            torch.float32,
            False,
        )
    for keys, warps, registers in ((32, 2, 208), (32, 4, 128), (64, 4, 208), (64, 4, 168)):
        yield (
            f"{keys} keys, {warps} warps, {registers} registers",
            replace(base, keys=keys, num_warps=warps, max_registers=registers),
            torch.float32,
            False,
        )
    for splits in (base.splits // 2, base.splits * 2, base.splits * 4):
        few = min(base.min_keys, max(64, case.num_keys // max(splits, 1)))
        yield f"{splits} splits", replace(base, splits=splits, min_keys=few), torch.float32, False


def flash_attention(case: Case, num_tokens: int = 1) -> Callable[[], object] | None:
    """FlashAttention-3's paged decode of the same lengths, or None where it cannot be had.

    Args:
        case: The rows.
        num_tokens: Tokens of each row.
    """
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
        from vllm.vllm_flash_attn.flash_attn_interface import (
            FA3_AVAILABLE,
            FA3_UNAVAILABLE_REASON,
            get_scheduler_metadata,
        )
    except ImportError as error:
        print(f"FlashAttention-3 is not importable: {error}")
        return None
    if not FA3_AVAILABLE:
        print(f"FlashAttention-3 is not available: {FA3_UNAVAILABLE_REASON}")
        return None
    table = case.batch.block_table
    # [num_blocks, block_size, num_kv_heads, head_size], the layout vLLM gives it
    cache = torch.empty(
        2, len(case.pages.kv), BLOCK_SIZE, case.num_kv_heads, HEAD_SIZE, dtype=torch.bfloat16
    )
    cache = cache.to("cuda").normal_()
    lengths = torch.full((case.num_rows,), case.num_keys, dtype=torch.int32, device="cuda")
    starts = torch.arange(case.num_rows + 1, dtype=torch.int32, device="cuda") * num_tokens
    query = case.query.repeat_interleave(num_tokens, 0)
    output = torch.empty_like(query)
    metadata = get_scheduler_metadata(
        batch_size=case.num_rows,
        max_seqlen_q=num_tokens,
        max_seqlen_k=case.num_keys,
        num_heads_q=case.num_heads,
        num_heads_kv=case.num_kv_heads,
        headdim=HEAD_SIZE,
        cache_seqlens=lengths,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=starts,
        page_size=BLOCK_SIZE,
        causal=True,
    )

    def run() -> object:
        return flash_attn_varlen_func(
            q=query,
            k=cache[0],
            v=cache[1],
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=num_tokens,
            seqused_k=lengths,
            max_seqlen_k=case.num_keys,
            softmax_scale=SCALE,
            causal=True,
            block_table=table,
            scheduler_metadata=metadata,
            fa_version=3,
        )

    return run


def measure(num_rows: int, num_keys: int, tiny: bool, is_fp8: bool) -> None:
    """Print a line per variant of one shape."""
    from vllm_cascade.kernels.decode import attend as paged_decode

    device, dtype = ("cpu", torch.float16) if tiny else ("cuda", torch.bfloat16)
    case = Case(num_rows, num_keys, dtype, device, is_fp8)
    assert case.pages.score is not None
    print(f"\n{num_rows} rows of {num_keys} keys: {case.bytes / 1e9:.3f} GB of keys and values")
    reference = None
    flash = None if tiny else flash_attention(case)
    if flash is not None:
        reference = median_ms(flash)
        print(
            f"{'FlashAttention-3':28} {reference:8.4f} ms {case.bytes / reference / 1e6:7.0f} GB/s"
        )
    del flash
    scratch = paged_decode.make_scratch(
        num_rows,
        NUM_HEADS,
        NUM_KV_HEADS,
        HEAD_SIZE,
        dtype.itemsize,
        num_keys,
        128,
        torch.device(device),
    )
    for name, config, table_dtype, scored in launches(case, tiny):
        cos, sin = case.tables(table_dtype)

        def run(cos=cos, sin=sin, config=config, scored=scored) -> None:
            paged_decode.decode(
                case.output,
                case.query,
                case.pages,
                case.batch,
                cos,
                sin,
                True,
                SCALE,
                2.0,
                "max",
                scratch,
                scored=scored,
                config=config,
            )

        try:
            case.output.fill_(float("nan"))
            case.pages.score.zero_()
            run()
            error, score_error = case.error((0, num_rows - 1))
            line = f"{name:28}"
            if not tiny:
                ms = median_ms(run)
                line += f" {ms:8.4f} ms {case.bytes / ms / 1e6:7.0f} GB/s"
                line += f" {ms / reference:6.3f}x" if reference else ""
            line += f"  error {error:.1e}"
            line += f", score {score_error:.1e}" if scored else ""
            print(line, flush=True)
        except Exception as error:  # a launch that does not fit the device, for one
            print(f"{name:28} failed: {type(error).__name__}: {str(error)[:120]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="run in Triton's interpreter")
    parser.add_argument(
        "--shape", action="append", metavar="ROWSxKEYS", help="instead of the usual four"
    )
    parser.add_argument("--fp8", action="store_true", help="keys and values in FP8 (e4m3)")
    options = parser.parse_args()
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    usual = ["2x70"] if options.tiny else ["64x16384", "64x1100", "8x16384", "1x16384"]
    for shape in options.shape or usual:
        num_rows, num_keys = map(int, shape.split("x"))
        measure(num_rows, num_keys, options.tiny, options.fp8)
        if not options.tiny:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
