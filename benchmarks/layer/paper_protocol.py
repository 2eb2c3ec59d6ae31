"""The paper's latency protocol: one attention layer over random hidden states, 4K to 1M tokens.

As in the authors' `cascade/main/jobs/latency.py` (github.com/jeffwillette/cascading_cache_2): the
self-attention module of Llama-3.1-8B with its projections, batch 1, hidden states drawn at random,
a cache of 16,384 tokens with 64 sinks, 4 sub-caches, a sweep of strides. The paper (arXiv
2406.17808) reports 6.8x less time than FlashAttention-2 at 1M tokens.

Two things differ. Steps have 8,192 tokens whatever the stride, as an engine's have, and hold many
strides; and dtype is bfloat16, not float16. The cascade's time has all that a layer does, planning
of each step included; the baselines get one call over all tokens and rotate nothing.

Nothing is reported of a policy that does not agree with the float64 oracle first, and no row of
which the device counters (pairs scored, groups merged, tokens dropped) are not what the layout
predicts or an output is not finite.

    python benchmarks layer.paper_protocol         writes benchmarks/results/gpu_paper_protocol.csv
    python benchmarks layer.paper_protocol --tiny  proves the program at an interpreter's sizes
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

TINY = "--tiny" in sys.argv
if TINY and not torch.cuda.is_available():
    # Read when triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from layer import baselines  # noqa: E402
from layer.bench import FLASH2, FLASH3, OURS  # noqa: E402
from layer.driver import Driver, check_against_oracle, make_config  # noqa: E402
from layer.stopwatch import once  # noqa: E402
from records import (  # noqa: E402
    RESULTS,
    RefusalError,
    conditions,
    in_words,
    percentiles,
    write_rows,
)
from vllm_cascade.attention.gpu_workspace import Shape  # noqa: E402

OUTPUT = RESULTS / "gpu_paper_protocol.csv"
# Longest prompt that is timed three times; longer ones once.
REPEATED = 1 << 17


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is timed.

    Args:
        shape: The layer's heads.
        hidden: Channels of a hidden state.
        tokens: Lengths, in order.
        sides: (policy, stride) of each cascade.
        cascade: Its other options.
        chunk: Tokens of an engine step.
        checked: Options of the comparison with the oracle, of 340 tokens.
    """

    shape: Shape
    hidden: int
    tokens: tuple[int, ...]
    sides: tuple[tuple[str, int], ...]
    cascade: dict[str, int]
    chunk: int
    checked: dict[str, int]


def options_of(policy: str, options: dict[str, int]) -> dict[str, int]:
    """The options, with a window for small strides under policies whose own is wider."""
    small = policy != "paper" and options["cache_tokens"] < 1024
    return {**options, "selection_window": 32} if small else options


CHECKED = {"cache_tokens": 128, "num_sub_caches": 2, "stride": 64, "num_sink_tokens": 16}
FULL = Sizes(
    shape=Shape(32, 8, 128, torch.bfloat16),
    hidden=4096,
    tokens=tuple(1 << n for n in range(12, 21)),
    # This project's default rule, then the paper's over the strides, and both together.
    sides=(
        ("distinct", 4096),
        ("distinct", 1024),
        *(("paper", 1 << n) for n in range(12, 7, -1)),
        ("blend", 4096),
    ),
    cascade={"cache_tokens": 16_384, "num_sub_caches": 4, "num_sink_tokens": 64},
    chunk=8192,
    checked=CHECKED,
)
SMALL = Sizes(
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    shape=Shape(4, 2, 64, torch.bfloat16 if torch.cuda.is_available() else torch.float32),
    hidden=64,
    tokens=(128, 256, 384),
    sides=(("distinct", 64), ("paper", 64), ("paper", 32)),
    cascade={"cache_tokens": 128, "num_sub_caches": 2, "num_sink_tokens": 16},
    chunk=128,
    checked=CHECKED,
)


class Module:
    """Projections around attention, over hidden states drawn at random.

    Args:
        sizes: What is timed.
        device: Where.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        shape, longest = sizes.shape, max(sizes.tokens)
        kind: dict[str, Any] = {"dtype": shape.dtype, "device": device}
        generator = torch.Generator(device).manual_seed(0)

        def draw(rows: int, columns: int, deviation: float) -> torch.Tensor:
            drawn = torch.empty(rows, columns, **kind)
            for part in drawn.split(1 << 16):
                part.normal_(0, deviation, generator=generator)
            return drawn

        self.shape = shape
        own, kv = (n * shape.head_size for n in (shape.num_heads, shape.num_kv_heads))
        self.widths = (own, kv, kv)
        # [longest, hidden]; projections keep the variance.
        self.hidden = draw(longest, sizes.hidden, 1.0)
        self.qkv = draw(own + 2 * kv, sizes.hidden, sizes.hidden**-0.5)
        self.out = draw(sizes.hidden, own, own**-0.5)
        self.attended = torch.zeros(longest, shape.num_heads, shape.head_size, **kind)
        self.result = torch.zeros_like(self.hidden)

    def project(self, start: int, end: int) -> list[torch.Tensor]:
        """Query, key and value of the tokens start .. end - 1, [tokens, heads, head_size] each."""
        parts = functional.linear(self.hidden[start:end], self.qkv).split(self.widths, -1)
        return [part.unflatten(-1, (-1, self.shape.head_size)) for part in parts]

    def finish(self, start: int, end: int) -> None:
        """Project what was attended."""
        attended = self.attended[start:end].flatten(1)
        torch.mm(attended, self.out.T, out=self.result[start:end])

    def with_attention(self, attend: baselines.Attention, num_tokens: int) -> None:
        """The module with one call of another's attention."""
        attend(*self.project(0, num_tokens), self.attended[:num_tokens])
        self.finish(0, num_tokens)

    def with_cascade(self, driver: Driver, num_tokens: int, chunk: int) -> None:
        """The module with the cascade, step by step."""
        for step in driver.chunks(num_tokens, chunk):
            ((_, start, end),) = step.spans
            metadata = driver.plan(step)
            driver.forward(metadata, *self.project(start, end), self.attended[start:end])
            self.finish(start, end)


class Bench:
    """Times the sides; those of the cascade are held against the layout.

    Args:
        sizes: What is timed.
        device: Where.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.module = Module(sizes, device)
        self.drivers: dict[tuple[str, int], Driver] = {}
        flash = {FLASH3: baselines.flash3, FLASH2: baselines.flash2}
        plain = {FLASH3: baselines.plain, FLASH2: baselines.plain}
        self.attentions = flash if device.type == "cuda" else plain
        for attend in self.attentions.values():
            self.module.with_attention(attend, min(sizes.tokens))

    def time(self, run: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds of a run, and of the host until all of it was queued."""
        return once(run, self.device.type == "cuda")

    def theirs(self, side: str, num_tokens: int) -> dict[str, Any]:
        """A row of a baseline."""
        attend, times = self.attentions[side], 3 if num_tokens <= REPEATED else 1
        found = [
            self.time(lambda: self.module.with_attention(attend, num_tokens)) for _ in range(times)
        ]
        return self.row(num_tokens, side, found)

    def ours(self, policy: str, stride: int, num_tokens: int) -> dict[str, Any]:
        """A row of the cascade.

        Raises:
            RefusalError: It did other work than the layout has, or its output is not finite.
        """
        sizes, module = self.sizes, self.module
        driver = self.driver(policy, stride)
        predicted = driver.predicted(*driver.chunks(num_tokens, sizes.chunk))
        found = []
        for _ in range(3 if num_tokens <= REPEATED else 1):
            driver.workspace.counters.zero_()
            module.result[:num_tokens].fill_(float("nan"))
            found.append(self.time(lambda: module.with_cascade(driver, num_tokens, sizes.chunk)))
            predicted.check(driver.counted(), f"{policy}, stride {stride}, {num_tokens:,} tokens")
            parts = module.result[:num_tokens].split(1 << 16)
            if not all(bool(part.isfinite().all()) for part in parts):
                raise RefusalError(f"{policy}, stride {stride}: outputs are not finite")
        return self.row(num_tokens, OURS, found, policy, stride)

    def driver(self, policy: str, stride: int) -> Driver:
        """The layer of one cascade, warmed up past its budget."""
        key = policy, stride
        if key not in self.drivers:
            sizes = self.sizes
            longest = max(sizes.tokens)
            options = options_of(policy, sizes.cascade)
            config = make_config(longest, policy=policy, stride=stride, **options)
            driver = Driver(config, sizes.shape, sizes.chunk, 1, self.device)
            warm = 2 * (config.cache_tokens + config.num_sink_tokens) + 4 * stride
            self.module.with_cascade(driver, min(warm, longest), sizes.chunk)
            self.drivers[key] = driver
        return self.drivers[key]

    def row(
        self,
        num_tokens: int,
        side: str,
        found: list[tuple[float, float]],
        policy: str = "",
        stride: int | None = None,
    ) -> dict[str, Any]:
        """A line of results.

        Args:
            num_tokens: Tokens of the prompt.
            side: Whose attention.
            found: Milliseconds and the host's of each run.
            policy: Of the cascade.
            stride: Of the cascade.
        """
        p20, p50, p80 = (float(f"{ms:.4g}") for ms in percentiles([ms for ms, _ in found]))
        cascade = self.sizes.cascade if policy else {}
        return {
            "tokens": num_tokens,
            "side": side,
            "policy": policy,
            "stride": stride,
            "cache_tokens": cascade.get("cache_tokens"),
            "num_sub_caches": cascade.get("num_sub_caches"),
            "step_tokens": self.sizes.chunk if policy else num_tokens,
            "runs": len(found),
            "ms_p20": p20,
            "ms_p50": p50,
            "ms_p80": p80,
            "host_ms": float(f"{percentiles([host for _, host in found])[1]:.4g}"),
            "fa2_over_ours": None,
            "fa3_over_ours": None,
        }


def compare(rows: list[dict[str, Any]]) -> None:
    """Write into the cascade's rows how many times longer the baselines take for their tokens."""
    ms = {(row["side"], row["tokens"]): row["ms_p50"] for row in rows if not row["policy"]}
    for row in rows:
        if row["policy"]:
            for column, side in (("fa2_over_ours", FLASH2), ("fa3_over_ours", FLASH3)):
                theirs = ms.get((side, row["tokens"]))
                row[column] = theirs and float(f"{theirs / row['ms_p50']:.4g}")


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"\n{'tokens':>9} {'side':18} {'stride':>6} {'ms p50':>10} {'host ms':>10} FA2/ FA3/")
    for row in rows:
        ratios = [row[name] or "" for name in ("fa2_over_ours", "fa3_over_ours")]
        print(
            f"{row['tokens']:9,} {row['side'] + ' ' + row['policy']:18} {row['stride'] or '':>6} "
            f"{row['ms_p50']:10,.2f} {row['host_ms']:10,.2f} {ratios[0]} {ratios[1]}"
        )


def checked_policies(sizes: Sizes, device: torch.device) -> list[str]:
    """The policies that agree with the oracle."""
    agreeing = []
    for policy in dict.fromkeys(policy for policy, _ in sizes.sides):
        try:
            found = check_against_oracle(
                sizes.shape, 340, 6, device, policy=policy, **options_of(policy, sizes.checked)
            )
            print(f"{policy} agrees with the float64 oracle: {found}")
            agreeing.append(policy)
        except RefusalError as error:
            print(f"{policy} IS NOT REPORTED: {error}")
    return agreeing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove the program")
    parser.add_argument("--longest", type=int, help="leave out prompts of more tokens")
    parser.add_argument("--output", type=Path, default=None if TINY else OUTPUT)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("PyTorch sees no CUDA device; --tiny runs without one")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes = SMALL if arguments.tiny else FULL
    stated = conditions()
    print(in_words(stated))
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    refused = 0

    def add(row: Callable[[], dict[str, Any]]) -> None:
        nonlocal refused
        try:
            rows.append(row())
        except Exception:
            # The other rows may still be had on a machine that is not there for long.
            refused += 1
            print(f"NOT REPORTED:\n{traceback.format_exc()}")
            return
        compare(rows)
        if arguments.output:
            write_rows(arguments.output, stated, rows)

    with torch.inference_mode():
        policies = checked_policies(sizes, device)
        bench = Bench(sizes, device)
        for num_tokens in sizes.tokens:
            if arguments.longest and num_tokens > arguments.longest:
                break
            for side in (FLASH3, FLASH2):
                add(lambda s=side, n=num_tokens: bench.theirs(s, n))
            for policy, stride in sizes.sides:
                if policy in policies:
                    add(lambda p=policy, s=stride, n=num_tokens: bench.ours(p, s, n))
            print(f"{time.perf_counter() - begin:6.0f} s: {num_tokens:,} tokens done")
    report(rows)
    if arguments.output and rows:
        print(f"\nwrote {arguments.output}")
    return 1 if refused or len(policies) < len({policy for policy, _ in sizes.sides}) else 0


if __name__ == "__main__":
    sys.exit(main())
