"""Tiles and launches of single kernels, side by side."""
