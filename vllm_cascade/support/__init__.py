"""Whether CASCADE can serve this model with this vLLM, and what it says if not."""
