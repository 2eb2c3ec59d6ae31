"""Triton kernels that choose which tokens stay, and move them."""
