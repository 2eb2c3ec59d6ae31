"""Prints the README's table of patches."""

from vllm_cascade.patches import table

print(table())
