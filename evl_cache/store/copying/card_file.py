"""The card of a cache, its README.md: text for people, which copies carry along and no check reads."""

from pathlib import Path

from evl_cache.errors import CacheError, WaitEnded
from evl_cache.store.disk.publish import write_atomic
from evl_cache.store.objects.objects import Objects

CARD_NAME = "README.md"
_MOST_NBYTES = 1 << 20


def read_card(objects: Objects) -> bytes | None:
    """Return the card of a cache; None where it has none, or something else."""
    try:
        return objects.get(CARD_NAME, most_nbytes=_MOST_NBYTES)
    except WaitEnded:
        raise
    except (FileNotFoundError, CacheError):  # none; a server that hides so says forbidden
        return None


def may_replace_card(objects: Objects) -> bool:
    """Whether a cache has no README.md, or one that is a card: a person's own text stays."""
    try:
        found = objects.get(CARD_NAME, most_nbytes=_MOST_NBYTES)
    except FileNotFoundError:
        return True
    except WaitEnded:
        raise
    except CacheError:
        return False
    return found.startswith(b"---\n") and b'"evl-cache"' in found.partition(b"\n---")[0]


def write_card(cache_path: Path, content: bytes) -> None:
    """Write or replace the card of a cache, whole or not at all. Raises: CacheError where the disk refuses."""
    write_atomic(cache_path / CARD_NAME, content)
