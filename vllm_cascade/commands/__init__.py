"""The command `vllm-cascade plan`, and what all commands share."""
