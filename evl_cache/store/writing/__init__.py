"""A cache created, its blocks written, and the cache finished."""
