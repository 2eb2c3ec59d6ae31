"""Does a vLLM have all that the patches and the plugin build on? Read from its source."""
