"""Videos decoded in processes of their own, which may crash, hang or leak: `pool`, `process`, `worker`."""
