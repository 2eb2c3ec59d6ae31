"""Whole engines: what users of a server see."""
