"""The operations of prefill, decode and merge in plain PyTorch, for a CPU."""
