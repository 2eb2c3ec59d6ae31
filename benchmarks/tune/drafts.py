"""Time of paged decode of tokens with drafts, which load keys together, against FlashAttention-3.

Milliseconds of one layer, measured as in `tune.decode`; head size 128, bfloat16 queries.

    python benchmarks tune.drafts                                # the usual shapes
    python benchmarks tune.drafts --shape 32x5x2000x12x2 --all   # with other launches beside it
    python benchmarks tune.drafts --tiny                         # in Triton's interpreter
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tune.decode import HEAD_SIZE, SCALE, Case, flash_attention, median_ms

# Requests, tokens of each, keys that it holds, query heads and KV heads.
SHAPES = (
    "32x5x2000x12x2", "32x5x4736x12x2", "32x4x2000x32x8", "32x5x2000x32x8", "32x8x2000x32x8",
    "16x5x16384x32x8", "16x5x16384x64x8", "1x5x16384x32x8",
)  # fmt: skip


def with_drafts(case: Case, tokens: int) -> Any:
    """The rows of a case as the last tokens of requests, each behind the other."""
    from vllm_cascade.kernels.segments import DecodeRows

    rows, device = case.num_rows * tokens, case.query.device

    def repeat(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(tokens, 0).contiguous()

    number = torch.arange(tokens, dtype=torch.int32, device=device).repeat(case.num_rows)
    return DecodeRows(
        rows=torch.arange(rows, dtype=torch.int32, device=device),
        places=repeat(case.batch.places) - (tokens - 1) + number,
        block_table=repeat(case.batch.block_table),
        carry=repeat(case.batch.carry),
        weights=repeat(case.batch.weights),
        per_request=tokens,
    )


def launches(base: Any, tiny: bool) -> Iterator[tuple[str, Any]]:
    """Name and launch of each variant."""
    if tiny:
        yield "by place", replace(base, by_place=True)
        return
    for keys, warps, stages in (
        (32, 2, 3), (32, 4, 3), (32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 2),
        (64, 8, 3), (128, 8, 2), (128, 4, 2),
    ):  # fmt: skip
        chosen = replace(base, keys=keys, num_warps=warps, num_stages=stages)
        yield f"{keys} keys, {warps} warps, {stages} stages", chosen
    for splits in (base.splits // 2, base.splits * 2):
        few = min(base.min_keys, max(64, 2048 // max(splits, 1)))
        yield f"{splits} splits", replace(base, splits=max(1, splits), min_keys=few)
    yield "by place", replace(base, by_place=True)


def measure(shape: str, tiny: bool, is_fp8: bool, is_all: bool) -> None:
    """Print the time of a shape, and of other launches of it."""
    from vllm_cascade.kernels.decode import attend as paged_decode
    from vllm_cascade.kernels.decode.launch_config import count_teams, tokens_together

    requests, tokens, keys, *heads = map(int, shape.split("x"))
    device, dtype = ("cpu", torch.float16) if tiny else ("cuda", torch.bfloat16)
    case = Case(requests, keys, dtype, device, is_fp8, (heads[0], heads[1]))
    flash = None if tiny else flash_attention(case, tokens)
    reference = None if flash is None else median_ms(flash)
    del flash
    batch, group = with_drafts(case, tokens), heads[0] // heads[1]
    query = torch.randn(requests * tokens, heads[0], HEAD_SIZE, device=device).to(dtype)
    made = requests * tokens, *heads, HEAD_SIZE, case.pages.kv.element_size(), keys, 64
    cos, sin = case.tables(torch.float32)
    pages = replace(case.pages, score=None)

    def run(rows: Any, config: Any = None) -> torch.Tensor:
        scratch = scratches[rows.per_request]
        paged_decode.decode(
            output, query, pages, rows, cos, sin, True, SCALE, 2.0, "max", scratch,
            scored=False, config=config,
        )  # fmt: skip
        return output

    scratches = {
        n: paged_decode.make_scratch(*made, torch.device(device), scored=False, per_request=n)
        for n in (1, tokens)
    }
    output = torch.empty_like(query)
    single = replace(batch, per_request=1)
    expected = run(single).clone()
    base = paged_decode.launch_config(
        count_teams(len(batch.rows), tokens, group, HEAD_SIZE),
        heads[1],
        HEAD_SIZE,
        keys,
        case.pages.kv.element_size(),
        True,
        num_queries=group * tokens_together(tokens, group, HEAD_SIZE),
    )
    print(f"\n{shape}{' FP8' if is_fp8 else ''}: {case.bytes / 1e9:.3f} GB; chosen {base}")
    if reference is not None:
        print(f"{'FlashAttention-3':28} {reference:8.4f} ms")
        print(f"{'one by one':28} {median_ms(lambda: run(single)):8.4f} ms", flush=True)
    for name, config in [("together", None), *(launches(base, tiny) if is_all or tiny else ())]:
        try:
            output.fill_(float("nan"))
            error = float((run(batch, config).float() - expected.float()).abs().max())
            line = f"{name:28}"
            if not tiny:
                ms = median_ms(lambda config=config: run(batch, config))
                line += f" {ms:8.4f} ms" + (f" {ms / reference:6.3f}x" if reference else "")
            print(f"{line}  differs by {error:.1e}", flush=True)
        except Exception as error:  # a launch that does not fit the device, for one
            print(f"{name:28} failed: {type(error).__name__}: {str(error)[:120]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="run in Triton's interpreter")
    parser.add_argument("--shape", action="append", metavar="REQUESTSxTOKENSxKEYSxHEADSxKV_HEADS")
    parser.add_argument("--fp8", action="store_true", help="keys and values in FP8 (e4m3)")
    parser.add_argument("--all", action="store_true", help="other launches too")
    options = parser.parse_args()
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    for shape in options.shape or (["2x3x70x4x2"] if options.tiny else SHAPES):
        measure(shape, options.tiny, options.fp8, options.all)
        if not options.tiny:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
