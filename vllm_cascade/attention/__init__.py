"""The worker's side: it prepares each step, writes keys and values, attends and merges."""
