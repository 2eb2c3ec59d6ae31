"""A long text to read."""

from vllm_cascade.evaluation.texts import king_james

__all__ = ["king_james"]
