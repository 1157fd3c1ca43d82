"""What kind of disk a path is on: only on a local one may files be mapped."""

from functools import lru_cache
from pathlib import Path

# Kinds whose pages the kernel itself reads. A mapped file of any other (NFS, Lustre, FUSE, SMB, 9p, …) that is
# changed or lost elsewhere kills the process that touches it.
_LOCAL = frozenset("ext2 ext3 ext4 xfs btrfs zfs f2fs tmpfs ramfs overlay bcachefs jfs".split())
_MOUNTS = Path("/proc/self/mounts")


@lru_cache(maxsize=256)
def is_local(directory: Path) -> bool:
    """Whether a directory is on a local disk; False where that cannot be told."""
    try:
        lines = _MOUNTS.read_text().splitlines()
        resolved = directory.resolve(strict=True)
    except OSError:
        return False
    best, kind = -1, ""
    for line in lines:
        _, mount, name, *_ = line.split(" ")
        point = Path(mount.encode().decode("unicode_escape"))
        # A later mount hides an earlier one at the same place.
        if len(point.parts) >= best and (resolved == point or point in resolved.parents):
            best, kind = len(point.parts), name
    return kind in _LOCAL
