"""The decoder on a GPU: Triton kernels that read codes as they are stored. Imported only where a path needs them."""
