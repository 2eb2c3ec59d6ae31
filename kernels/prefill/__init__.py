"""Triton kernels for steps of several tokens of a request."""
