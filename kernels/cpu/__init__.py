"""The same by PyTorch on a CPU."""
