"""README.md beside a cache: text for people, which nothing else reads. It is carried along, and proves nothing."""

import contextlib
from pathlib import Path

from evl_cache.errors import CacheError
from evl_cache.store.disk.publish import stage_file
from evl_cache.store.objects.objects import Objects

CARD_NAME = "README.md"
_MOST_NBYTES = 1 << 20


def read_card(objects: Objects) -> bytes | None:
    """The card of the cache there; None where it has none, or something else."""
    with contextlib.suppress(FileNotFoundError, CacheError):
        return objects.get(CARD_NAME, most_nbytes=_MOST_NBYTES)
    return None


def write_card(root: Path, content: bytes) -> None:
    """Write or replace it, whole or not at all. Raises: CacheError where the disk refuses."""
    with stage_file(root) as staged:
        staged.write(content)
        staged.publish_replacing(root / CARD_NAME)
