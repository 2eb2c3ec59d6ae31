"""Whether a vLLM has all that the patches and the plugin build on, read from vLLM's source."""
