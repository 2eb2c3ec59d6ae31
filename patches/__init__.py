"""Guarded patches for places where vLLM has no hook; ships as `vllm_cascade.patches`.

Importing this package imports neither torch nor vLLM, because one of the modules runs while vLLM
still has to find out which platform it is on.
"""

from __future__ import annotations

from vllm_cascade.patches import (
    backend_pickling,
    chunked_layers,
    continued_requests,
    cpu_backend_selection,
    cpu_distribution_name,
    draft_boundaries,
    evicted_tokens,
    exact_requests,
    front_end_validation,
    late_drafts,
    long_max_model_len,
    rope_at_logical_place,
    taken_back_tokens,
    whole_page_copies,
)
from vllm_cascade.patches.record import VLLM_RANGE, Patch, PatchError, in_range

__all__ = ["PATCHES", "VLLM_RANGE", "Patch", "PatchError", "apply_all", "in_range", "table"]

PATCHES = (
    backend_pickling.PATCH,
    cpu_backend_selection.PATCH,
    rope_at_logical_place.PATCH,
    chunked_layers.PATCH,
    long_max_model_len.PATCH,
    front_end_validation.PATCH,
    exact_requests.PATCH,
    evicted_tokens.PATCH,
    continued_requests.PATCH,
    taken_back_tokens.PATCH,
    draft_boundaries.PATCH,
    late_drafts.PATCH,
    whole_page_copies.PATCH,
    cpu_distribution_name.PATCH,
)


def apply_all(patches: tuple[Patch, ...] = PATCHES) -> None:
    """Apply every patch that was not applied before in this process.

    All patches are checked before the first is applied, so vLLM is never left half patched.

    Args:
        patches: The patches, in the order to apply them.

    Raises:
        PatchError: A patch does not fit the installed vLLM.
    """
    pending = [patch for patch in patches if not patch.applied]
    for patch in pending:
        patch.check()
    for patch in pending:
        patch.apply()


def table() -> str:
    """Write all patches as a Markdown table."""
    head = ["| patch | target | vLLM | cures | can go when |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(head + [patch.row() for patch in PATCHES])
