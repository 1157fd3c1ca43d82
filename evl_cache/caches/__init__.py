"""Caches as a lab sees them: found by what they hold, listed, watched, shared, described."""
