"""The name that users write: ``worker_extension_cls="vllm_cascade.trace.WorkerExtension"``."""

from vllm_cascade.attention.trace import WorkerExtension

__all__ = ["WorkerExtension"]
