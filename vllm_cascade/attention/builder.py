"""The builder that vLLM asks once a step for what all layers are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_cascade.attention import trace
from vllm_cascade.attention.cpu_step import CascadeMetadata, plan_step
from vllm_cascade.kv_cache.spec import CascadeSpec
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.support.drafts import WITH_SAMPLED

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_cascade.attention.gpu_step import GpuMetadata, Planner


class CascadeMetadataBuilder(AttentionMetadataBuilder[Any]):
    """Prepares each step, once for all layers.

    Args:
        kv_cache_spec: The spec of CASCADE's layers, which carries the configuration.
        layer_names: The layers, as vLLM names them.
        vllm_config: vLLM's complete configuration.
        device: Where the layers are.

    Raises:
        RuntimeError: A layer did not get its rotary embedding. The model would rotate the layer's
            keys by their position in the text, which outgrows the model's positions.
    """

    # Tokens, and the drafts behind them, are resolved one by one on the device, from the tensors
    # that a CUDA graph reads. vLLM's graphs are for requests of as many tokens as that.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    # Asked on a GPU alone.
    supports_draft_decode_metadata_update = True

    def __init__(
        self,
        kv_cache_spec: CascadeSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.layout = build_layout(kv_cache_spec.config)
        self.seen = trace.Seen(self.layout) if self.layout.config.trace_tokens else None
        layers = vllm_config.compilation_config.static_forward_context
        for name in layer_names:
            layers[name].impl.seen = self.seen
            if layers[name].impl.worker is None:
                raise RuntimeError(
                    f"CASCADE did not get the rotary embedding of layer {name}: the model was "
                    "loaded by a loader that does not call BaseModelLoader.load_model. Start "
                    "vLLM with --load-format auto"
                )
        speculative = vllm_config.speculative_config
        with_sampled = speculative is not None and speculative.method in WITH_SAMPLED
        self._num_sampled = int(with_sampled)
        # Whether these are the layers of a draft model alone, and how far it has come.
        self._is_draft_model = with_sampled and all(
            layers[name].is_draft_layer for name in layer_names
        )
        self._num_ahead = 0
        self.planner = None
        if device.type != "cpu":
            from vllm_cascade.attention.gpu_step import Planner

            # Layers that share a plan may differ in query heads, and so in workspaces.
            workspaces = [layers[name].impl.worker.workspace for name in layer_names]
            self.planner = Planner(
                self.layout,
                device,
                vllm_config.scheduler_config.max_num_seqs,
                min(workspace.max_keys for workspace in workspaces),
                1 + vllm_config.num_speculative_tokens,
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CascadeMetadata | GpuMetadata:
        """Cut a step's batch into waves, where vLLM's builders copy lengths and block tables.

        Args:
            common_prefix_len: Not used: no two requests share blocks.
            common_attn_metadata: vLLM's description of the step.
            fast_build: Not used.

        Returns:
            The step, for `CpuLayer` or `GpuLayer`.
        """
        if self.planner is not None:
            return self._build_on_device(self.planner, common_attn_metadata)
        num_reqs = common_attn_metadata.num_reqs
        seq_lens = common_attn_metadata.seq_lens[:num_reqs].numpy()
        if self.seen is not None:
            block_table = common_attn_metadata.block_table_tensor[:num_reqs].numpy()
            self.seen.note(block_table, seq_lens)
        return self._plan(common_attn_metadata, seq_lens)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> CascadeMetadata:
        """Cut a drafter's batch into waves: first what the model has computed, then each draft.

        Drafts do not pass the next boundary, which the model has yet to come to. Those at it and
        behind it are written to the boundary's place, for the model will not be given them.

        Args:
            common_attn_metadata: vLLM's description of the drafter's batch.
            draft_index: 0 for what the model has computed, else the number of a draft, with one
                token of each request.

        Returns:
            The step, for `CpuLayer`.
        """
        seq_lens = common_attn_metadata.seq_lens[: common_attn_metadata.num_reqs].numpy()
        num_ahead = draft_index + self._num_sampled
        if draft_index:
            ends = [self.layout.end_after(token) for token in (seq_lens - num_ahead).tolist()]
            seq_lens = np.minimum(seq_lens, ends)
        return self._plan(common_attn_metadata, seq_lens, num_ahead)

    def _plan(
        self, step: CommonAttentionMetadata, seq_lens: npt.NDArray[Any], num_ahead: int = 0
    ) -> CascadeMetadata:
        return plan_step(
            self.layout,
            step.query_start_loc_cpu[: step.num_reqs + 1].numpy(),
            seq_lens,
            step.block_table_tensor[: step.num_reqs].numpy(),
            num_ahead,
        )

    def update_draft_decode_metadata(self, metadata: GpuMetadata) -> None:
        """Go on to a drafter's next step, of one token of each request, on the device alone.

        vLLM's model runner V2 calls this, for EAGLE and MTP, before each draft but the first one,
        which comes out of the pass over what the model has computed. Where a CUDA graph has the
        drafts, this is recorded in it.

        Args:
            metadata: From `build`; changed in place.
        """
        assert self.planner is not None
        self.planner.update_draft(metadata)

    def _build_on_device(self, planner: Planner, step: CommonAttentionMetadata) -> GpuMetadata:
        num_reqs = step.num_reqs
        assert step.seq_lens_cpu_upper_bound is not None
        seq_lens_cpu = step.seq_lens_cpu_upper_bound[:num_reqs].numpy()
        starts, seq_lens = step.query_start_loc[: num_reqs + 1], step.seq_lens[:num_reqs]
        block_table = step.block_table_tensor[:num_reqs]
        if self.seen is not None:
            # Only tracing waits for the device.
            ends = planner.last_written(starts.cpu().numpy(), seq_lens.cpu().numpy())
            self.seen.note(block_table.cpu().numpy(), ends)
        if self._is_draft_model:
            # In a draft model's first step each request has the sampled token and others.
            self._num_ahead = 1 if step.max_query_len > 1 else self._num_ahead + 1
            if self._num_ahead > 1:
                return planner.plan_draft(starts, seq_lens, block_table, self._num_ahead)
        starts_cpu = step.query_start_loc_cpu[: num_reqs + 1].numpy()
        return planner.plan(
            starts, starts_cpu, seq_lens, seq_lens_cpu, block_table, self._is_draft_model
        )
