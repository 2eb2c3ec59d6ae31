"""The rows of `layer.run`: what is set against what, and the bounds to reach."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from layer import baselines
from layer.bench import FLASH2, FLASH3, OURS, XFORMERS, Bench, Sizes
from layer.driver import BLOCK_SIZE, Driver, Inputs, make_config
from records import Counts, RefusalError, percentiles
from vllm_cascade.attention.gpu_step import GpuMetadata
from vllm_cascade.kernels.merge import groups as compaction

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """What a row has to reach.

    Args:
        ratio: What is divided by what.
        must: Bound on the ratio.
        aim: Bound to hope for.
        is_floor: Whether the ratio must be at least the bound, or at most.
    """

    ratio: str
    must: float | None = None
    aim: float | None = None
    is_floor: bool = True

    def verdict(self, ratio: float) -> str:
        """Which bound the ratio keeps."""

        def keeps(bound: float | None) -> bool:
            return bound is not None and (ratio >= bound if self.is_floor else ratio <= bound)

        if self.must is None:
            return "-"
        return "aim" if keeps(self.aim) else "must" if keeps(self.must) else "missed"


def record(
    name: str,
    num_tokens: int,
    side: str,
    ms: tuple[float, ...] | list[float],
    *,
    floor: float | None = None,
    ratio: float | None = None,
    ratio_floor: float | None = None,
    target: Target | None = None,
    note: str = "",
) -> Row:
    """One line of results.

    Args:
        name: Of the row.
        num_tokens: Tokens of the prompt, or keys of a decoded token.
        side: Whose.
        ms: Of every timed run.
        floor: Least ms.
        ratio: As `target` says.
        ratio_floor: The ratio at the floor.
        target: What the ratio is and has to be.
        note: Whatever the reader must know.
    """
    p20, p50, p80 = percentiles(ms)
    return {
        "row": name,
        "tokens": num_tokens,
        "side": side,
        "runs": len(ms),
        "ms_p20": _short(p20),
        "ms_p50": _short(p50),
        "ms_p80": _short(p80),
        "floor_ms": _short(floor),
        "ratio": _short(ratio),
        "ratio_floor": _short(ratio_floor),
        "must": target and target.must,
        "aim": target and target.aim,
        "reached": target.verdict(ratio) if target and ratio is not None else "",
        "ratio_is": target.ratio if target else "",
        "note": note,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def prefill(
    bench: Bench, name: str, side: str, num_tokens: int, target: Target, is_wide: bool = False
) -> list[Row]:
    """A prompt with the cascade against another's attention."""
    sizes = bench.sizes
    note = ""
    if side == FLASH2 and num_tokens > sizes.middle and not bench.is_long:
        theirs: tuple[float, ...] = (bench.extrapolated(side, num_tokens),)
        note = f"extrapolated quadratically from {sizes.middle:,} tokens"
    else:
        theirs = bench.attention(side, num_tokens, 5)
    times = sizes.passes if num_tokens > sizes.short else 2 * sizes.passes
    ours = bench.cascade(num_tokens, is_wide, max(3, times // 2) if is_wide else times)
    host = percentiles(bench.cascade_host_ms[num_tokens, is_wide])[1]
    floor = bench.floor(num_tokens, is_wide, sizes.middle)
    ratio = percentiles(theirs)[1] / percentiles(ours)[1]
    best = percentiles(theirs)[1] / floor
    return [
        record(name, num_tokens, side, theirs, note=note),
        record(
            name,
            num_tokens,
            OURS,
            ours,
            floor=floor,
            ratio=ratio,
            ratio_floor=best,
            target=target,
            note=f"chunks of {sizes.chunk:,}; queued by the host in {host:.0f} ms",
        ),
    ]


def under_budget(bench: Bench, name: str) -> list[Row]:
    """A prompt of which nothing is dropped, in one chunk; the outputs must agree."""
    tokens, shape = bench.sizes.under, bench.sizes.shape
    theirs = bench.attention(FLASH3, tokens, 4 * bench.sizes.passes)
    ours = bench.cascade(tokens, False, 4 * bench.sizes.passes)
    query, key, value, output = bench.inputs.rows(0, tokens)
    found = output.clone()
    driver = bench.driver()
    angles = (driver.layer.cos[:tokens, None], driver.layer.sin[:tokens, None])
    rotated = (baselines.rotated(x, *angles) for x in (query, key))
    bench.attentions[FLASH3]()(*rotated, value, output)
    error = (found.float() - output.float()).norm() / output.float().norm()
    if not bool(error <= 2 * torch.finfo(shape.dtype).eps):
        raise RefusalError(f"under the budget the output differs from {FLASH3}'s by {error:.1e}")
    floor = percentiles(theirs)[1]
    target = Target("ours / baseline", 1.10, 1.04, is_floor=False)
    ratio = percentiles(ours)[1] / floor
    note = f"output within {error:.1e} of the baseline's"
    best = 1.5 if bench.driver().config.needs_scores else 1.0
    return [
        record(name, tokens, FLASH3, theirs),
        record(
            name, tokens, OURS, ours, floor=best * floor, ratio=ratio, ratio_floor=best,
            target=target,
            note=note,
        ),
    ]  # fmt: skip


class Decode:
    """One token of each of several requests, right after a boundary in the middle of a request."""

    def __init__(self, bench: Bench, pages: torch.dtype | None = None) -> None:
        sizes, shape = bench.sizes, replace(bench.sizes.shape, pages=pages)
        config = make_config(sizes.long, **sizes.narrow)
        self.bench = bench
        self.driver = Driver(config, shape, sizes.chunk, sizes.num_decodes, bench.device)
        self.driver.fill()
        epochs = self.driver.layout.epochs
        token = epochs[len(epochs) // 2].start
        self.length = epochs[len(epochs) // 2].place(token) + 1
        spans = [(request, token, token + 1) for request in range(sizes.num_decodes)]
        self.step = self.driver.step(*spans)
        self.inputs = Inputs.random(shape, sizes.num_decodes, bench.device)
        metadata = self.driver.plan(self.step)
        assert metadata.decode is not None and metadata.decode.merges is not None
        unmerged = GpuMetadata(replace(metadata.decode, merges=None), [])
        self.replays = {
            is_checked: bench.graph(functools.partial(self.forward, which), sizes.layers_per_graph)
            for is_checked, which in ((True, metadata), (False, unmerged))
        }

    def forward(self, metadata: GpuMetadata) -> None:
        """Run the layer."""
        inputs = self.inputs
        self.driver.forward(metadata, inputs.query, inputs.key, inputs.value, inputs.output)

    @functools.cached_property
    def timed(self) -> dict[bool, list[float]]:
        """Milliseconds of a layer with the check for boundaries and without, in turn."""
        layers, replays = self.bench.sizes.layers_per_graph, self.bench.sizes.replays
        for replay in (*self.replays.values(), *self.replays.values()):
            replay()
        found: dict[bool, list[float]] = {True: [], False: []}
        self.driver.workspace.counters.zero_()
        for _ in range(replays):
            for is_checked, replay in self.replays.items():
                found[is_checked] += [ms / layers for ms in self.bench.measure(replay, 1)]
        predicted = self.driver.predicted(self.step).times(2 * layers * replays)
        predicted.check(self.driver.counted(), "decode")
        if not bool(self.inputs.output.isfinite().all()):
            raise RefusalError("decode gives outputs that are not finite")
        return found

    def theirs(self) -> tuple[str, list[float]]:
        """The fastest way of FlashAttention-3, and its milliseconds."""
        sizes, bench = self.bench.sizes, self.bench
        calls_of = baselines.flash3_decodes if bench.has_gpu else baselines.plain_decodes
        calls = calls_of(self.inputs.query, sizes.shape.num_kv_heads, self.length, BLOCK_SIZE)
        best: tuple[str, list[float]] | None = None
        for name, call in calls.items():
            replay = bench.graph(call, sizes.layers_per_graph)
            replay()
            found = [ms / sizes.layers_per_graph for ms in bench.measure(replay, sizes.replays)]
            if best is None or percentiles(found)[1] < percentiles(best[1])[1]:
                best = name, found
        assert best is not None
        return best


@functools.cache
def decode_case(bench: Bench, pages: torch.dtype | None = None) -> Decode:
    """The one that all rows share, with pages of the activations' dtype or of another."""
    return Decode(bench, pages)


def decode(bench: Bench, name: str) -> list[Row]:
    """Single tokens against FlashAttention-3's paged decode of the same length."""
    case, shape = decode_case(bench), bench.sizes.shape
    ours = case.timed[True]
    how, theirs = case.theirs()
    key_bytes = 2 * shape.head_size * shape.dtype.itemsize
    if case.driver.config.needs_scores:
        # A score is read and written, and so is every query head's logit.
        key_bytes += 8 + 8 * shape.num_heads // shape.num_kv_heads
    keys = bench.sizes.num_decodes * case.length * shape.num_kv_heads
    floor = keys * key_bytes / bench.copy_rate
    target = Target("ours / baseline", 1.08, 1.03, is_floor=False)
    ratio = percentiles(ours)[1] / percentiles(theirs)[1]
    best = floor / percentiles(theirs)[1]
    note = f"{bench.sizes.num_decodes} requests; copy at {bench.copy_rate / 1e9:.2f} TB/s"
    return [
        record(name, case.length, FLASH3, theirs, note=f"paged, {how}"),
        record(
            name, case.length, OURS, ours, floor=floor, ratio=ratio, ratio_floor=best,
            target=target, note=note,
        ),
    ]  # fmt: skip


def decode_check(bench: Bench, name: str) -> list[Row]:
    """What looking for a boundary adds to a decode step without one."""
    case = decode_case(bench)
    checked, unchecked = case.timed[True], case.timed[False]
    ratio = percentiles(checked)[1] / percentiles(unchecked)[1] - 1
    target = Target("added share", 0.03, 0.01, is_floor=False)
    return [
        record(name, case.length, f"{OURS} without the check", unchecked),
        record(name, case.length, OURS, checked, ratio=ratio, target=target),
    ]


def decode_fp8(bench: Bench, name: str) -> list[Row]:
    """Single tokens with keys and values in FP8 against those in the activations' dtype."""
    wide, narrow = decode_case(bench), decode_case(bench, torch.float8_e4m3fn)
    theirs, ours = wide.timed[True], narrow.timed[True]
    shape = bench.sizes.shape
    keys = bench.sizes.num_decodes * narrow.length * shape.num_kv_heads
    floor = keys * 2 * shape.head_size / bench.copy_rate
    target = Target("FP8 / the other", 0.65, 0.55, is_floor=False)
    ratio = percentiles(ours)[1] / percentiles(theirs)[1]
    best = floor / percentiles(theirs)[1]
    note = f"{bench.sizes.num_decodes} requests; copy at {bench.copy_rate / 1e9:.2f} TB/s"
    return [
        record(name, wide.length, OURS, theirs),
        record(
            name, narrow.length, f"{OURS}, FP8", ours, floor=floor, ratio=ratio, ratio_floor=best,
            target=target, note=note,
        ),
    ]  # fmt: skip


def compaction_share(bench: Bench, name: str) -> list[Row]:
    """Selection and compaction against the whole time of a full stride that ends at a boundary."""
    sizes, driver = bench.sizes, bench.driver()
    driver.fill()
    epoch = driver.layout.epochs[len(driver.layout.epochs) // 2]
    step = driver.step((0, epoch.start, epoch.end))
    metadata = driver.plan(step)
    rows = bench.inputs.rows(epoch.start, epoch.end)
    ((launch,),) = (each.launches for each in metadata.rounds)
    merges = launch.merges
    assert merges is not None
    config, space = driver.config, driver.workspace

    def merge() -> None:
        compaction.merge_groups(
            driver.pages,
            merges,
            sizes.shape.head_size,
            config.selection_window,
            driver.layer.weights,
            space.merge,
            space.counters[1:],
            has_sums=True,
        )

    driver.forward(metadata, *rows)
    replay = bench.graph(merge, sizes.layers_per_graph)
    replay()
    space.counters.zero_()
    stride = bench.measure(lambda: driver.forward(metadata, *rows), sizes.replays)
    merging = [ms / sizes.layers_per_graph for ms in bench.measure(replay, sizes.replays)]
    once = driver.predicted(step)
    alone = Counts(0, once.groups, once.dropped).times(sizes.layers_per_graph * sizes.replays)
    all_in = once.times(sizes.replays)
    total = Counts(all_in.pairs, all_in.groups + alone.groups, all_in.dropped + alone.dropped)
    total.check(driver.counted(), "a stride and its boundary")
    ratio = percentiles(merging)[1] / percentiles(stride)[1]
    target = Target("share", 0.03, 0.01, is_floor=False)
    return [
        record(name, epoch.end - epoch.start, f"{OURS}, the whole stride", stride),
        record(
            name, epoch.end - epoch.start, f"{OURS}, compaction", merging, ratio=ratio,
            target=target, note=f"{len(epoch.groups)} groups of each KV head",
        ),
    ]  # fmt: skip


def rows_of(sizes: Sizes) -> dict[str, Callable[[Bench, str], list[Row]]]:
    """Name of a row to what measures it."""

    def faster(
        side: str, tokens: int, must: float | None, aim: float | None, is_wide: bool = False
    ) -> Callable[[Bench, str], list[Row]]:
        target = Target("baseline / ours", must, aim)
        return lambda bench, name: prefill(bench, name, side, tokens, target, is_wide)

    return {
        "decode_fa3": decode,
        "decode_check": decode_check,
        "decode_fp8": decode_fp8,
        "compaction_share": compaction_share,
        "prefill_16k_fa3": under_budget,
        "prefill_64k_xformers": faster(XFORMERS, sizes.short, None, None),
        "prefill_1m_fa3": faster(FLASH3, sizes.long, 25, 27),
        "prefill_1m_fa2": faster(FLASH2, sizes.long, None, None),
        "prefill_1m_wide_fa3": faster(FLASH3, sizes.long, 7, 7.6, is_wide=True),
    }
