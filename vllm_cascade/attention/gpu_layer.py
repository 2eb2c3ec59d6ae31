"""One cascade layer's forward pass on a GPU: write, merge, attend and score, round by round."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from vllm_cascade.attention.gpu_step import DecodeStep, GpuMetadata, Round, Rows
from vllm_cascade.attention.gpu_workspace import Shape, Workspace, flash_attention
from vllm_cascade.kernels import kv_write
from vllm_cascade.kernels.decode import attend as paged_decode
from vllm_cascade.kernels.launch import Recording, alike
from vllm_cascade.kernels.merge import groups as compaction
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.kernels.prefill import attention as prefill_attention
from vllm_cascade.kernels.prefill import scores as key_scores
from vllm_cascade.kernels.prefill import workspace as prefill_workspace
from vllm_cascade.kernels.segments import Merges, Segments
from vllm_cascade.kernels.weights import Weights
from vllm_cascade.structure.config import CascadeConfig


class GpuLayer:
    """Attends the batches of one layer.

    Args:
        config: A valid configuration.
        shape: The layer's heads.
        scale: Factor on the attention logits.
        cos: [num_positions, rotary_dim / 2] float32 cosines.
        sin: [num_positions, rotary_dim / 2] float32 sines.
        is_neox: Whether channel i is paired with i + rotary_dim / 2, or 2i with 2i + 1.
        workspace: Scratch that all layers of this shape share.
        sinks: [num_heads] sink logits, which join the softmax's denominator, or None.
        soft_cap: Soft cap on the attention logits, or 0 for none.
    """

    def __init__(
        self,
        config: CascadeConfig,
        shape: Shape,
        scale: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        is_neox: bool,
        workspace: Workspace,
        sinks: torch.Tensor | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        self.config = config
        self.shape = shape
        self.scale = scale
        self.cos, self.sin, self.is_neox = cos, sin, is_neox
        self.workspace = workspace
        self.sinks = sinks
        self.soft_cap = soft_cap
        self.weights = Weights(config.score_weight, config.key_weight, config.value_weight)
        self.flash = flash_attention(shape)
        # Layers of one kind launch the same kernels; only their tensors differ.
        self.kind = (config, shape, scale, soft_cap, is_neox, id(workspace))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: Pages,
        metadata: GpuMetadata,
        output: torch.Tensor,
    ) -> None:
        """Attend one step's batch.

        Args:
            query: [num_tokens, num_heads, head_size] before RoPE.
            key: [num_tokens, num_kv_heads, head_size] before RoPE.
            value: [num_tokens, num_kv_heads, head_size].
            pages: The layer's pages.
            metadata: The step; the first layer of a kind leaves its launches in it.
            output: [num_tokens, num_heads, head_size], written where the batch has tokens.
        """
        tensors = (query, key, value, output, *pages.tensors, self.cos, self.sin, self.sinks)
        recordings = metadata.recordings.setdefault((*self.kind, alike(tensors)), {})

        def once(part: Hashable, run: Callable[..., None], *args: Any, lse: Any = None) -> None:
            """Launch a part of the step: a kind's first layer calls `run`, others repeat it."""
            if part in recordings:
                recordings[part].repeat((*tensors, lse))
                return
            with Recording((*tensors, lse)) as recording:
                run(*args)
            recordings[part] = recording

        if metadata.decode is not None:
            once("decode", self._decode, query, key, value, pages, metadata.decode, output)
        for number, each in enumerate(metadata.rounds):
            place = id(self.workspace), number
            rows = metadata.rows.get(place)
            if rows is None:
                rows = metadata.rows[place] = self._rows(each.segments)
            once((number, "prepare"), self._prepare, query, key, value, pages, each, rows)
            lse = self._attend_rows(each, rows, output)
            if self.config.needs_scores:
                once((number, "score"), self._score, pages, each, rows, lse, lse=lse)
        if metadata.sampled is not None:
            once("sampled", self._decode, query, key, value, pages, metadata.sampled, output)

    def _decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: Pages,
        step: DecodeStep,
        output: torch.Tensor,
    ) -> None:
        config, space = self.config, self.workspace
        kv_write.write(pages, key, value, step.rows.rows, step.slots, step.tokens)
        paged_decode.decode(
            output,
            query,
            pages,
            step.rows,
            self.cos,
            self.sin,
            self.is_neox,
            self.scale,
            config.score_power,
            config.score_reduction,
            space.decode,
            scored=config.needs_scores,
            counter=space.counters[:1] if config.needs_scores else None,
            sinks=self.sinks,
            soft_cap=self.soft_cap,
        )
        if step.merges is not None:
            self._merge(pages, step.merges, has_sums=False)

    def _prepare(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: Pages,
        each: Round,
        rows: Rows,
    ) -> None:
        """Write keys and values to their pages, and all that attention reads to the workspace.

        Without scores a boundary merges before the next wave, which finds what it leaves.
        """
        for launch in each.launches:
            prefill_workspace.prepare(
                pages,
                launch.segments,
                query,
                key,
                value,
                each.rows,
                each.tokens,
                self.cos,
                self.sin,
                self.is_neox,
                rows.query,
                rows.key,
                rows.value,
                self.weights,
                self.workspace.merge.sums,
            )
            if launch.merges is not None and not self.config.needs_scores:
                self._merge(pages, launch.merges, has_sums=True)

    def _rows(self, segments: Segments) -> Rows:
        """The rows of the workspace that a round's segments take."""
        space, num_rows, num_queries = self.workspace, segments.num_rows, segments.num_queries
        return Rows(
            query=space.query[:num_queries],
            key=space.key[:num_rows],
            value=space.value[:num_rows],
            packed=space.output[:num_queries],
            query_starts=segments.query_spans.view(-1),
            key_starts=segments.key_spans.view(-1),
        )

    def _score(self, pages: Pages, each: Round, rows: Rows, lse: torch.Tensor) -> None:
        """After attention, where scores are kept: score the keys, and merge at a boundary."""
        config, space = self.config, self.workspace
        (launch,) = each.launches
        key_scores.score_keys(
            pages,
            launch.segments,
            rows.query,
            rows.key,
            lse,
            self.scale,
            config.score_decay,
            config.score_power,
            config.score_reduction,
            space.counters[:1],
            self.soft_cap,
            shifts=space.shifts,
        )
        if launch.merges is not None:
            self._merge(pages, launch.merges, has_sums=True)

    def _attend_rows(self, each: Round, rows: Rows, output: torch.Tensor) -> torch.Tensor:
        """Attend a round's rows of the batch; return the log-sum-exps, as `_attend` does."""
        if each.span is not None:
            return self._attend(output[each.span[0] : each.span[1]], rows, each.segments)
        lse = self._attend(rows.packed, rows, each.segments)
        output[each.rows.long()] = rows.packed
        return lse

    def _attend(self, output: torch.Tensor, rows: Rows, segments: Segments) -> torch.Tensor:
        """Write `output`; return log-sum-exps [num_heads, num_queries], sink logits included."""
        if self.flash is None:
            lse = self.workspace.lse[:, : segments.num_queries]
            prefill_attention.attend(
                output,
                lse,
                rows.query,
                rows.key,
                rows.value,
                segments,
                self.scale,
                self.sinks,
                self.soft_cap,
            )
            return lse
        _, lse = self.flash(
            rows.query,
            rows.key,
            rows.value,
            segments.max_query_len,
            rows.query_starts,
            segments.max_key_len,
            cu_seqlens_k=rows.key_starts,
            softmax_scale=self.scale,
            causal=True,
            softcap=self.soft_cap,
            return_softmax_lse=True,
            out=output,
            fa_version=3,
            s_aux=self.sinks,
        )
        return lse

    def _merge(self, pages: Pages, merges: Merges, *, has_sums: bool) -> None:
        compaction.merge_groups(
            pages,
            merges,
            self.shape.head_size,
            self.config.selection_window,
            self.weights,
            self.workspace.merge,
            self.workspace.counters[1:],
            has_sums=has_sums,
        )
