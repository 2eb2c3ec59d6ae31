"""Has vLLM reject the drafts that a boundary keeps CASCADE's layers from computing."""

from __future__ import annotations

import functools
from typing import Any

from vllm_cascade.patches.record import Patch


def install() -> None:
    """Wrap model runner V2's rejection sampler, which takes a mask of drafts to be rejected."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    init, call = RejectionSampler.__init__, RejectionSampler.__call__

    @functools.wraps(init)
    def init_with_boundaries(
        self: Any, sampler: Any, spec_config: Any, device: Any, **kwargs: Any
    ) -> None:
        from vllm.config import get_current_vllm_config_or_none

        init(self, sampler, spec_config, device, **kwargs)
        self.cascade_boundaries = None
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None and has_late_drafts(vllm_config):
            from vllm_cascade.structure.layout import build_layout
            from vllm_cascade.support.resolved import resolve_options

            config = resolve_options(vllm_config)
            self.cascade_boundaries = build_layout(config).epochs[0].end, config.stride

    @functools.wraps(call)
    def call_without_late_drafts(
        self: Any,
        logits: Any,
        input_batch: Any,
        draft_logits: Any = None,
        invalid_drafts: Any = None,
    ) -> Any:
        if self.cascade_boundaries is not None:
            from vllm_cascade.kernels.block_tables import find_late

            late = find_late(
                input_batch.positions,
                input_batch.logits_indices,
                input_batch.expanded_local_pos,
                *self.cascade_boundaries,
            )
            invalid_drafts = late if invalid_drafts is None else late | invalid_drafts
        return call(self, logits, input_batch, draft_logits, invalid_drafts)

    RejectionSampler.__init__ = init_with_boundaries
    RejectionSampler.__call__ = call_without_late_drafts


def has_late_drafts(vllm_config: Any) -> bool:
    """Whether drafts at a boundary and behind it are computed for nothing, and rejected.

    Else the scheduler gives a row no such drafts (`draft_boundaries`).

    Args:
        vllm_config: vLLM's complete configuration.
    """
    from vllm_cascade.support.names import is_cascade

    return bool(
        vllm_config.speculative_config is not None
        and vllm_config.use_v2_model_runner
        and vllm_config.device_config.device_type != "cpu"
        and is_cascade(vllm_config.attention_config.backend)
    )


PATCH = Patch(
    name="late_drafts",
    target="vllm.v1.worker.gpu.spec_decode.rejection_sampler.RejectionSampler.__call__",
    signature="(self, logits, input_batch, draft_logits=None, invalid_drafts=None)",
    symptom=(
        "Drafts at a boundary, which cannot be taken back, might be accepted; or rows short of "
        "drafts would keep vLLM from replaying CUDA graphs"
    ),
    removal="vLLM asks the attention backend which drafts it can verify",
    install=install,
)
