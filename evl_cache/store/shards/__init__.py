"""Shard files of the Zarr v3 sharding format: written as a stream, read chunk by chunk."""
