"""Shows which tokens of a text a cascade kept: the command `vllm-cascade inspect`."""
