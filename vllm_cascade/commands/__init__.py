"""What `vllm-cascade` does beside evaluation and inspection."""
