"""Device operations of the cascade; ships as `vllm_cascade.kernels`."""
