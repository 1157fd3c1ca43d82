"""Input that a stranger may have written: JSON, descriptions of caches, files of weights; checked before use."""
