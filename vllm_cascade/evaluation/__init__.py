"""The quality of answers with different caches, measured on vLLM's engine: `vllm-cascade eval`."""
