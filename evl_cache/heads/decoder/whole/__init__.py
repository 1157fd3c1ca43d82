"""The decoder on whole tensors: few, large operations of torch, for a device that waits for each one's start."""
