"""What the cache costs in quality."""
