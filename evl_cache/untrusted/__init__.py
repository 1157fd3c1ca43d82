"""Check input that a stranger may have written, before it is used: JSON, descriptions of caches, files of weights."""
