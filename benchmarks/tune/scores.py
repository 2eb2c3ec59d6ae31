"""Time of every configuration of `score_keys` on one CUDA device.

Llama-3.1-8B's attention in bfloat16. Each row gives the median time, the rate of the one matrix
product over the pairs that the causal mask leaves, and the largest error of a score, relative to
the largest score, against float64 on some heads and keys. A configuration that is wrong by more
than 1e-4 is reported as such, not timed.

    python benchmarks tune.scores            the table
    python benchmarks tune.scores --tiny     tiny shapes, through Triton's interpreter too
"""

import argparse
import os
import statistics
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from vllm_cascade.kernels.pages import Pages  # noqa: E402
from vllm_cascade.kernels.prefill import scores as key_scores  # noqa: E402
from vllm_cascade.kernels.segments import Segments  # noqa: E402

# Queries and keys of the one segment.
SHAPES = ((4096, 20480), (1024, 17408), (16384, 16384))
TINY_SHAPES = ((40, 200), (24, 140), (130, 130))
HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
GROUP = HEADS // KV_HEADS
SCALE = HEAD_SIZE**-0.5
DECAY, POWER, CARRY = 0.9999999, 2.0, 0.9
# The interpreter has no products of bfloat16.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = 1e-4
CHECKED_HEADS = (0, KV_HEADS - 1)


def make_segments(num_queries: int, num_keys: int) -> Segments:
    blocks = -(-num_keys // BLOCK_SIZE)
    return Segments(
        query_spans=torch.tensor([[0, num_queries]], dtype=torch.int32, device=DEVICE),
        key_spans=torch.tensor([[0, num_keys]], dtype=torch.int32, device=DEVICE),
        block_table=torch.randperm(blocks, device=DEVICE)[None].int(),
        carry=torch.tensor([CARRY], device=DEVICE),
        exponents=torch.tensor([-1.0], device=DEVICE),
        num_groups=torch.zeros(1, dtype=torch.int32, device=DEVICE),
        num_queries=num_queries,
        num_rows=num_keys,
        max_query_len=num_queries,
        max_key_len=num_keys,
        max_prefix_len=num_keys - num_queries,
    )


def make_pages(num_keys: int) -> Pages:
    blocks, channels = -(-num_keys // BLOCK_SIZE), 2 * HEAD_SIZE
    slots = KV_HEADS * BLOCK_SIZE
    stride = slots * channels + slots * 4 // DTYPE.itemsize
    storage = torch.randn(blocks * stride, device=DEVICE).to(DTYPE)
    shape = (blocks, KV_HEADS, BLOCK_SIZE, channels)
    kv = storage.as_strided(shape, (stride, BLOCK_SIZE * channels, channels, 1))
    return Pages.view(kv, has_score=True, has_token=False)


def normalizers(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[HEADS, num_queries] float32 log-sum-exps of causal attention."""
    num_queries, num_keys = len(query), len(key)
    lse = torch.empty(HEADS, num_queries, device=DEVICE)
    places = torch.arange(num_keys, device=DEVICE)
    for head in range(HEADS):
        for first in range(0, num_queries, 2048):
            rows = torch.arange(first, min(first + 2048, num_queries), device=DEVICE)
            logits = query[rows, head].float() @ key[:, head // GROUP].float().T * SCALE
            unseen = places > (num_keys - num_queries + rows)[:, None]
            lse[head, rows] = logits.masked_fill_(unseen, float("-inf")).logsumexp(-1)
    return lse


def expected(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, old: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """[len(CHECKED_HEADS), len(keys)] float64 scores.

    Args:
        query: [num_queries, HEADS, HEAD_SIZE].
        key: [num_keys, KV_HEADS, HEAD_SIZE].
        lse: [HEADS, num_queries].
        old: [KV_HEADS, num_keys] scores before.
        keys: Places to compute.
    """
    num_queries, num_keys = len(query), len(key)
    prefix = num_keys - num_queries
    rows = torch.arange(num_queries, device=DEVICE)
    weight = DECAY ** (-1.0 - rows.double())
    unseen = keys > (prefix + rows)[:, None]
    scores = []
    for kv_head in CHECKED_HEADS:
        best = torch.zeros(num_queries, len(keys), dtype=torch.float64, device=DEVICE)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            logits = query[:, head].double() @ key[keys, kv_head].double().T * SCALE
            best = torch.maximum(best, (logits - lse[head].double()[:, None]).exp() ** POWER)
        gained = weight @ best.masked_fill_(unseen, 0)
        kept = torch.where(keys < prefix, old[kv_head, keys].double() * CARRY, 0)
        scores.append(kept + gained)
    return torch.stack(scores)


def median_ms(work: Callable[[], None], repeats: int) -> float:
    if DEVICE.type == "cpu":
        return float("nan")
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def tune(num_queries: int, num_keys: int, names: list[str], repeats: int) -> None:
    pages, segments = make_pages(num_keys), make_segments(num_queries, num_keys)
    assert pages.score is not None
    # What is rotated is as random as what is not.
    key = torch.randn(num_keys, KV_HEADS, HEAD_SIZE, device=DEVICE).to(DTYPE)
    query = (1.5 * torch.randn(num_queries, HEADS, HEAD_SIZE, device=DEVICE)).to(DTYPE)
    print(f"\n{num_queries} queries, {num_keys} keys")
    lse = normalizers(query, key)
    blocks = segments.block_table[0].long()
    slots = torch.arange(num_keys, device=DEVICE)
    before = torch.rand(KV_HEADS, num_keys, device=DEVICE) * 0.01
    keys = torch.linspace(0, num_keys - 1, min(num_keys, 301), device=DEVICE).long().unique()
    exact = expected(query, key, lse, before, keys)
    pairs = num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) // 2
    size = key_scores.shifts_elements(num_queries, 1, HEADS, KV_HEADS)
    shifts = torch.empty(size, device=DEVICE)
    at = (blocks[slots // BLOCK_SIZE], slice(None), slots % BLOCK_SIZE)
    for name in names:
        counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)

        def score(count: torch.Tensor | None = None, name: str = name) -> None:
            key_scores.score_keys(
                pages,
                segments,
                query,
                key,
                lse,
                SCALE,
                DECAY,
                POWER,
                "max",
                count,
                shifts=shifts,
                config=name,
            )

        pages.score[at] = before.T
        try:
            score(counter)
        except Exception as error:
            # One that does not compile must not keep the others from being timed.
            print(f"{name:24} {type(error).__name__}: {str(error)[:120]!r}")
            continue
        got = pages.score[at].T[list(CHECKED_HEADS)][:, keys].double()
        worst = float((got - exact).abs().max() / exact.max())
        if not worst <= TOLERANCE or int(counter) != KV_HEADS * pairs:
            print(f"{name:24} WRONG: error {worst:.1e}, {int(counter)} pairs")
            continue
        milliseconds = median_ms(score, repeats)
        rate = 2 * HEAD_SIZE * HEADS * pairs / milliseconds / 1e9
        print(f"{name:24} {milliseconds:8.3f} ms {rate:8.0f} TFLOP/s, error {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("configs", nargs="*", default=list(key_scores.SCORE_CONFIGS))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for num_queries, num_keys in TINY_SHAPES if arguments.tiny else SHAPES:
        tune(num_queries, num_keys, arguments.configs, arguments.repeats)


if __name__ == "__main__":
    main()
