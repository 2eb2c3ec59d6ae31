"""One attention layer driven as the engine drives it, and the proof that it computes the cascade.

Steps go through `Planner.plan` and `GpuLayer.forward` with permuted blocks in a padded page pool
that starts full of NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from records import Counts, RefusalError, predict
from reference.attention import rope_table
from reference.cascade import CascadeParameters
from reference.cascade_attention import CascadeRun
from vllm_cascade.attention.gpu_layer import GpuLayer
from vllm_cascade.attention.gpu_step import GpuMetadata, Planner
from vllm_cascade.attention.gpu_workspace import Shape, make_workspace
from vllm_cascade.attention.trace import kept_in
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

THETA = 500_000.0
BLOCK_SIZE = 16
# Scores of rounded queries and keys that differ by less than this, relative, may rank either way.
NEAR = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-4}


def make_config(max_model_len: int, **options: Any) -> CascadeConfig:
    """The configuration that the options come to.

    Args:
        max_model_len: Most tokens of a request.
        options: Of the cascade.
    """
    return resolve(
        CascadeOptions.parse(options),
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        position_limit=1 << 20,
    )


@dataclass(frozen=True, slots=True)
class Step:
    """A batch of runs of tokens, with its lengths on the device as the engine has them.

    Args:
        spans: (request, first token, last + 1) of each run.
        query_start_loc: [len(spans) + 1] int32.
        query_start_loc_cpu: The same on the host.
        seq_lens: [len(spans)] int32.
        seq_lens_cpu: The same on the host.
        block_table: [len(spans), width] int32.
    """

    spans: Sequence[tuple[int, int, int]]
    query_start_loc: torch.Tensor
    query_start_loc_cpu: npt.NDArray[np.int32]
    seq_lens: torch.Tensor
    seq_lens_cpu: npt.NDArray[np.int32]
    block_table: torch.Tensor


class Driver:
    """A layer with its pages, for some requests.

    Args:
        config: The cascade.
        shape: The layer.
        max_num_batched_tokens: Most tokens of a step.
        num_requests: Rows of the block table.
        device: Where.
    """

    def __init__(
        self,
        config: CascadeConfig,
        shape: Shape,
        max_num_batched_tokens: int,
        num_requests: int,
        device: torch.device,
    ) -> None:
        self.config, self.shape, self.device = config, shape, device
        self.layout = build_layout(config)
        width = self.layout.max_blocks
        dtype = shape.pages or shape.dtype
        slots, size = shape.num_kv_heads * config.block_size, dtype.itemsize
        content = slots * 2 * shape.head_size
        tail = slots * (config.needs_scores + config.trace_tokens) * 4 // size
        # NaN in every dtype.
        pool = torch.full(
            (num_requests * width, (content + tail) * size), 255, dtype=torch.uint8, device=device
        ).view(dtype)
        view = (-1, shape.num_kv_heads, config.block_size, 2 * shape.head_size)
        kv = pool[:, :content].unflatten(1, view[1:])
        scales = ()
        if shape.pages is not None:
            # Numbers as drawn here need no other scale: a quarter of FP8's range is used.
            scales = torch.full((2, shape.num_kv_heads), 2.0**-5, device=device).unbind()
        self.pages = Pages.view(kv, config.needs_scores, config.trace_tokens, *scales)
        blocks = torch.randperm(num_requests * width, generator=torch.Generator().manual_seed(0))
        self.table = blocks.view(num_requests, width).to(torch.int32)
        self.device_table = self.table.to(device)
        places = min(config.max_places, config.max_model_len)
        cos, sin = rope_table(places, shape.head_size, THETA, torch.float32).to(device)
        workspace = make_workspace(config, shape, max_num_batched_tokens, num_requests, device)
        self.workspace = workspace
        self.layer = GpuLayer(config, shape, shape.head_size**-0.5, cos, sin, True, workspace)
        self.planner = Planner(self.layout, device, num_requests, workspace.max_keys)

    def fill(self) -> None:
        """Put random keys and values and a score of zero into every page."""
        for block in self.pages.kv.split(4096):
            if self.pages.is_fp8:
                block.copy_(32 * torch.randn(block.shape, device=self.device))
            else:
                block.normal_()
        if self.pages.score is not None:
            self.pages.score.zero_()

    def step(self, *spans: tuple[int, int, int]) -> Step:
        """A batch of runs of tokens: (request, first, last + 1) each."""
        starts = np.cumsum([0, *(end - start for _, start, end in spans)]).astype(np.int32)
        ends = np.array([end for _, _, end in spans], dtype=np.int32)
        rows = [request for request, _, _ in spans]
        return Step(
            spans=spans,
            query_start_loc=torch.from_numpy(starts).to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=torch.from_numpy(ends).to(self.device),
            seq_lens_cpu=ends,
            block_table=self.device_table[rows],
        )

    def chunks(self, num_tokens: int, chunk: int) -> list[Step]:
        """One request's prompt, cut as the scheduler does."""
        starts = range(0, num_tokens, chunk)
        return [self.step((0, start, min(start + chunk, num_tokens))) for start in starts]

    def plan(self, step: Step) -> GpuMetadata:
        """What the step does in every layer."""
        return self.planner.plan(
            step.query_start_loc,
            step.query_start_loc_cpu,
            step.seq_lens,
            step.seq_lens_cpu,
            step.block_table,
        )

    def forward(
        self,
        metadata: GpuMetadata,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Run the layer over a batch's rows."""
        self.layer.forward(query, key, value, self.pages, metadata, output)

    def prefill(self, steps: Iterable[Step], inputs: Inputs, layers: int = 1) -> None:
        """Run one request's chunks one after the other.

        Args:
            steps: The chunks.
            inputs: The request.
            layers: How often the layer runs on each chunk; more than once only where none merges.
        """
        for step in steps:
            ((_, start, end),) = step.spans
            metadata = self.plan(step)
            for _ in range(layers):
                self.forward(metadata, *inputs.rows(start, end))

    def counted(self) -> list[int]:
        """The device counters."""
        return self.workspace.counters.tolist()

    def predicted(self, *steps: Step) -> Counts:
        """What the counters gain by some steps."""
        spans = [(start, end) for step in steps for _, start, end in step.spans]
        return predict(self.layout, spans, self.shape.num_kv_heads)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Random hidden queries, keys and values of a request, and room for outputs.

    Args:
        query: [num_tokens, num_heads, head_size].
        key: [num_tokens, num_kv_heads, head_size].
        value: As `key`.
        output: As `query`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, num_tokens: int, device: torch.device, seed: int = 0) -> Inputs:
        """Draw `num_tokens` tokens; the output is NaN."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(heads: int) -> torch.Tensor:
            drawn = torch.empty(
                num_tokens, heads, shape.head_size, dtype=shape.dtype, device=device
            )
            for part in drawn.split(1 << 16):
                part.normal_(generator=generator)
            return drawn

        query, key, value = (
            draw(heads) for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        return cls(query, key, value, torch.full_like(query, float("nan")))

    def rows(self, start: int, end: int) -> tuple[torch.Tensor, ...]:
        """Query, key, value and output of the tokens start .. end - 1."""
        return tuple(x[start:end] for x in (self.query, self.key, self.value, self.output))


def check_against_oracle(
    shape: Shape, num_tokens: int, num_decodes: int, device: torch.device, **options: Any
) -> str:
    """Compare a small request with the float64 oracle, which replays the choices made here.

    The prompt runs one epoch at a time, its last tokens one by one; then once more with chunks of
    several epochs, whose waves attend at once where no scores are kept. FlashAttention-3 splits
    keys among programs by what a call has, so its sums may be in another order then, and these
    outputs too are held against the oracle.

    Args:
        shape: The layer.
        num_tokens: Tokens of the request, past the budget.
        num_decodes: Of these, how many are decoded; they cross a boundary.
        device: Where.
        options: Of the cascade.

    Returns:
        What was compared, in one line.

    Raises:
        RefusalError: Output or choices are off.
    """
    config = make_config(2 * num_tokens, trace_tokens=True, **options)
    driver = Driver(config, shape, num_tokens, 2, device)
    layout, prompt = driver.layout, num_tokens - num_decodes
    inputs = Inputs.random(shape, num_tokens, device)
    spans = [(s.start, s.end) for s in layout.segments(0, prompt)]
    spans += [(token, token + 1) for token in range(prompt, num_tokens)]
    driver.workspace.counters.zero_()
    forced: dict[int, torch.Tensor] = {}

    def kept(request: int, num_tokens: int) -> torch.Tensor:
        return kept_in(driver.pages, layout, driver.table[request].numpy(), num_tokens)

    for start, end in spans:
        driver.forward(driver.plan(driver.step((0, start, end))), *inputs.rows(start, end))
        if end == prompt:
            held = kept(0, end)
        boundary, rest = divmod(end - config.num_sink_tokens, config.stride)
        if end >= layout.epochs[0].end and rest == 0:
            forced[boundary] = kept(0, end).to("cpu", torch.int64)[None]
    steps = [driver.step((0, start, end)) for start, end in spans]
    driver.predicted(*steps).check(driver.counted(), "the check against the oracle")
    if not any(layout.epochs[0].end <= end and end > prompt for end in _boundaries(config, forced)):
        raise ValueError(f"no boundary among the {num_decodes} tokens that are decoded")

    again = Inputs(
        inputs.query, inputs.key, inputs.value, torch.full_like(inputs.output, torch.nan)
    )
    cuts = [0, *(end for _, end in spans[2:-num_decodes:3]), prompt]
    for start, end in itertools.pairwise(cuts):
        if end > start:
            driver.forward(driver.plan(driver.step((1, start, end))), *again.rows(start, end))
    if not torch.equal(kept(1, prompt), held):
        raise RefusalError("chunks of several epochs keep other tokens than one epoch at a time")

    heads = (shape.num_kv_heads, shape.num_heads // shape.num_kv_heads)
    query = inputs.query.cpu().unflatten(1, heads).permute(1, 2, 0, 3)
    key, value = (x.cpu().transpose(0, 1) for x in (inputs.key, inputs.value))
    found = {
        "one epoch at a time": inputs.output,
        "several epochs in a step": again.output[:prompt],
    }

    def attend(dtype: torch.dtype) -> tuple[torch.Tensor, CascadeRun]:
        table = rope_table(config.max_places, shape.head_size, THETA, dtype)
        run = CascadeRun(CascadeParameters.like(config), forced, NEAR[shape.dtype], 1)
        attended = run.attend(0, query.to(dtype), key.to(dtype), value.to(dtype), table)
        return attended.double(), run

    expected, run = attend(torch.float64)
    if run.comparison.unexplained:
        raise RefusalError(
            f"{len(run.comparison.unexplained)} of {run.comparison.windows} windows kept other "
            f"tokens than the oracle: {run.comparison.unexplained[0]}"
        )
    # The same in the working dtype by PyTorch alone: its error is what the dtype costs.
    eager, _ = attend(shape.dtype)
    allowed = (eager - expected).abs()
    unit = torch.finfo(shape.dtype).eps
    most = 2 * allowed.max() + unit * expected.abs().max()
    largest = 0.0
    for how, output in found.items():
        ours = output.cpu().unflatten(1, heads).permute(1, 2, 0, 3).double()
        error, tokens = (ours - expected[:, :, : len(output)]).abs(), slice(len(output))
        # Sums of float32 in another order: eager float32 rounds no weights to compare with.
        norm = max(1.5 * allowed[:, :, tokens].norm(), 4 * unit * expected[:, :, tokens].norm())
        if not bool(error.max() <= most and error.norm() <= norm):
            raise RefusalError(
                f"{how}, output differs from the float64 oracle by up to {error.max():.2e} (norm "
                f"{error.norm():.2e}); PyTorch in {shape.dtype} by {allowed.max():.2e} "
                f"({allowed.norm():.2e})"
            )
        largest = max(largest, error.max().item())
    return (
        f"{num_tokens:,} tokens, {len(forced)} boundaries, {run.comparison.windows} windows "
        f"({len(run.comparison.differing)} near-ties decided otherwise): largest error "
        f"{largest:.1e}, PyTorch's in {shape.dtype} {allowed.max():.1e}"
    )


def _boundaries(config: CascadeConfig, numbers: Iterable[int]) -> list[int]:
    return [config.num_sink_tokens + number * config.stride for number in numbers]
