"""May this model and this vLLM run, and what to say if not."""
