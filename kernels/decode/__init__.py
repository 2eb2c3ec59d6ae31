"""Triton kernels for steps of one token of each request."""
