"""The decoder on a processor: tokens in chunks that stay in its cache, slices of clips in threads."""
