"""Minutes of random load on one engine."""
