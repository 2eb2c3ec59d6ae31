"""One attention layer, driven as an engine drives it."""
