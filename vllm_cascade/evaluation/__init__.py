"""Quality of caches, measured on vLLM's engine: what `vllm-cascade eval` runs."""
