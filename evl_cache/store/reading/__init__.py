"""Samples read from a cache, on this disk or behind a URL."""
