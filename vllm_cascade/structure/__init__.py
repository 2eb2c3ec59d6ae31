"""What a cascade is: options, sub-caches, and which token stands where; integers alone."""
