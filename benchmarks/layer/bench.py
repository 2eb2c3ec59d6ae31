"""What `layer.run` times, and a stopwatch that refuses what did not do its work."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from layer import baselines
from layer.driver import Driver, Inputs, make_config
from layer.stopwatch import once
from records import RefusalError, attended_pairs, percentiles
from vllm_cascade.attention.gpu_workspace import Shape

OURS, FLASH3, FLASH2, XFORMERS = "CASCADE", "FlashAttention-3", "FlashAttention-2", "xformers"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is timed.

    Args:
        shape: The layer.
        chunk: Tokens of an engine step.
        long: Tokens of the longest prompt.
        middle: Longest prompt of which a baseline is timed several times.
        short: Prompt of the comparison with xformers.
        under: Prompt under the budget.
        narrow: The cascade of most rows.
        wide: The cascade of the row of the larger budget.
        num_decodes: Requests of a decode step.
        layers: Times that a prompt of one step is run over one plan, as a model has several.
        layers_per_graph: Times that a layer is captured, as a model has several.
        replays: Timed replays of a graph.
        passes: Timed runs of a prompt.
        drift: Most that a baseline may be off its quadratic extrapolation.
        checked: Tokens and decoded tokens of the comparison with the oracle.
        checked_cascade: Its cascade.
    """

    shape: Shape
    chunk: int
    long: int
    middle: int
    short: int
    under: int
    narrow: dict[str, int]
    wide: dict[str, int]
    num_decodes: int
    layers: int
    layers_per_graph: int
    replays: int
    passes: int
    drift: float
    checked: tuple[int, int]
    checked_cascade: dict[str, int]


def _cascade(budget: int, sub_caches: int, stride: int, **more: int) -> dict[str, int]:
    return {"cache_tokens": budget, "num_sub_caches": sub_caches, "stride": stride, **more}


FULL = Sizes(
    shape=Shape(32, 8, 128, torch.bfloat16),
    chunk=8192,
    long=1 << 20,
    middle=1 << 18,
    short=1 << 16,
    under=1 << 14,
    narrow=_cascade(16_384, 4, 4_096),
    wide=_cascade(65_536, 8, 4_096),
    num_decodes=64,
    layers=32,
    layers_per_graph=8,
    replays=30,
    passes=5,
    drift=0.05,
    checked=(2_900, 40),
    checked_cascade=_cascade(1_024, 4, 256),
)
# Triton's interpreter multiplies the bits of bfloat16 as integers.
SMALL = replace(
    FULL,
    shape=Shape(4, 2, 64, torch.bfloat16 if torch.cuda.is_available() else torch.float32),
    chunk=128,
    long=400,
    middle=256,
    short=192,
    under=128,
    narrow=_cascade(128, 2, 64, num_sink_tokens=16, selection_window=32),
    wide=_cascade(192, 3, 64, num_sink_tokens=16, selection_window=32),
    num_decodes=2,
    layers=2,
    layers_per_graph=2,
    replays=2,
    passes=2,
    drift=math.inf,
    checked=(340, 6),
    checked_cascade=_cascade(128, 2, 64, num_sink_tokens=16, selection_window=32),
)


class Bench:
    """Times the sides of the rows, each once."""

    def __init__(self, sizes: Sizes, device: torch.device, is_long: bool) -> None:
        self.sizes, self.device, self.is_long = sizes, device, is_long
        self.has_gpu = device.type == "cuda"
        # Of the run measured last: where it is near the device's time, the host holds it up.
        self.host_ms = 0.0
        # Token count -> the host's milliseconds of each prompt with the cascade.
        self.cascade_host_ms: dict[tuple[int, bool], list[float]] = {}
        self.attentions: dict[str, Callable[[], baselines.Attention]] = {
            FLASH3: lambda: baselines.flash3,
            FLASH2: lambda: baselines.flash2,
            XFORMERS: baselines.xformers_attention,
        }
        if not self.has_gpu:
            self.attentions |= {side: lambda: baselines.plain for side in (FLASH3, FLASH2)}

    def measure(self, run: Callable[[], object], times: int) -> list[float]:
        """Milliseconds of each of several runs."""
        found = []
        for _ in range(times):
            ms, host_ms = once(run, self.has_gpu)
            if self.has_gpu:
                self.host_ms = host_ms
            found.append(ms)
        return found

    def graph(self, run: Callable[[], object], repeats: int) -> Callable[[], object]:
        """What runs something several times; replays a graph on a GPU."""

        def repeated() -> None:
            for _ in range(repeats):
                run()

        if not self.has_gpu:
            return repeated
        # Compiles, and sets up what may not be set up while capturing.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            repeated()
        return captured.replay

    @functools.cached_property
    def inputs(self) -> Inputs:
        """The longest prompt's queries, keys and values; shorter ones are its start."""
        return Inputs.random(self.sizes.shape, self.sizes.long, self.device)

    @functools.cache  # noqa: B019
    def driver(self, is_wide: bool = False) -> Driver:
        """A layer for one prompt."""
        options = self.sizes.wide if is_wide else self.sizes.narrow
        config = make_config(self.sizes.long, **options)
        return Driver(config, self.sizes.shape, self.sizes.chunk, 1, self.device)

    @functools.cache  # noqa: B019
    def cascade(self, num_tokens: int, is_wide: bool, times: int) -> tuple[float, ...]:
        """Milliseconds of prompts with the cascade, and proof that they did all their work."""
        driver = self.driver(is_wide)
        chunk = max(self.sizes.chunk, num_tokens if num_tokens == self.sizes.under else 0)
        if chunk > self.sizes.chunk:
            config, shape = driver.config, self.sizes.shape
            driver = Driver(config, shape, chunk, 1, self.device)
        budget = driver.config.cache_tokens + driver.config.num_sink_tokens
        warm_up = driver.chunks(min(num_tokens, 2 * budget + 4 * driver.config.stride), chunk)
        driver.prefill(warm_up, self.inputs)
        steps = driver.chunks(num_tokens, chunk)
        # A step is planned once for all layers. In a prompt of many steps that is done while the
        # device works; a single step is timed as a whole model's layers over one plan.
        layers = self.sizes.layers if len(steps) == 1 else 1
        predicted = driver.predicted(*steps * layers)
        found = []
        host = self.cascade_host_ms.setdefault((num_tokens, is_wide), [])
        for _ in range(times):
            driver.workspace.counters.zero_()
            (ms,) = self.measure(lambda: driver.prefill(steps, self.inputs, layers), 1)
            found.append(ms / layers)
            host.append(self.host_ms)
            predicted.check(driver.counted(), f"{num_tokens:,} tokens with the cascade")
        return tuple(found)

    @functools.cache  # noqa: B019
    def attention(self, side: str, num_tokens: int, times: int) -> tuple[float, ...]:
        """Milliseconds of prompts with another's attention; one of the longest is checked."""
        attend = self.attentions[side]()
        query, key, value, out = self.inputs.rows(0, num_tokens)
        if num_tokens <= self.sizes.middle:
            attend(query, key, value, out)
            return tuple(self.measure(lambda: attend(query, key, value, out), times))
        (ms,) = self.measure(lambda: attend(query, key, value, out), 1)
        expected = self.extrapolated(side, num_tokens)
        if abs(ms / expected - 1) > self.sizes.drift:
            raise RefusalError(
                f"{side}: {num_tokens:,} tokens took {ms:,.0f} ms, {expected:,.0f} by quadratic "
                f"extrapolation from {self.sizes.middle:,}"
            )
        return (ms,)

    def extrapolated(self, side: str, num_tokens: int) -> float:
        """Milliseconds by the longest prompt that was timed several times."""
        times = 3 if side == FLASH3 else 2
        _, ms, _ = percentiles(self.attention(side, self.sizes.middle, times))
        return ms * causal_pairs(num_tokens) / causal_pairs(self.sizes.middle)

    def floor(self, num_tokens: int, is_wide: bool, timed: int) -> float:
        """Least milliseconds of the cascade.

        Args:
            num_tokens: Tokens of the prompt.
            is_wide: Which cascade.
            timed: Prompt whose FlashAttention-3 rate is taken.
        """
        layout = self.driver(is_wide).layout
        pairs = attended_pairs(layout, 0, num_tokens)
        _, ms, _ = percentiles(self.attention(FLASH3, timed, 3))
        # For scores, queries times keys a second time, without the values.
        return (1.5 if layout.config.needs_scores else 1.0) * ms * pairs / causal_pairs(timed)

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes read and written per millisecond by a copy."""
        source = torch.empty((1 << 30) if self.has_gpu else 1 << 20, dtype=torch.uint8)
        source = source.to(self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        _, ms, _ = percentiles(self.measure(lambda: target.copy_(source), 10))
        return 2 * source.numel() / ms


def causal_pairs(num_tokens: int) -> int:
    """Pairs of a query and a key that it sees, where every token is kept."""
    return num_tokens * (num_tokens + 1) // 2
