"""Quality of caches, measured on vLLM's engine: what `vllm-cascade eval` runs."""


class EvaluationError(ValueError):
    """Something that cannot be measured as asked; the message says what could be."""
