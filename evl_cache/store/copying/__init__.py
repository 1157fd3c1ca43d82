"""Caches copied block by block, whole or in part."""
