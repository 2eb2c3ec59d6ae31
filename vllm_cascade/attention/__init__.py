"""The worker's side: each step prepared, keys and values written, attended to and merged."""
