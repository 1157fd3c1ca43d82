"""What lies already where a cache is about to be laid down: what a killed job left of one, or a person's own files."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

from evl_cache.canonical_json import digest_matches
from evl_cache.errors import CacheError, UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import check_no_links, is_there, names_in, read_limited
from evl_cache.store.format.clip_table import ClipTable
from evl_cache.store.format.description import clips_lines
from evl_cache.store.format.layout import (
    ATTRIBUTE,
    CLIPS_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    RECOVERY_NAME,
    array_layouts,
)
from evl_cache.store.format.limits import file_limit
from evl_cache.store.shards.metadata import METADATA_NAME
from evl_cache.untrusted.json_text import parse_json

_SHARD = re.compile(r"c(\.[0-9].*)?\Z")  # a shard's file, or the folder of all
# Entries that our files of a name have, beside their digest.
_ENTRIES = {RECOVERY_NAME: {"group", "clips"}, MANIFEST_NAME: {"feature_id", "content_id", "files"}}


def check_place(cache_path: Path, spec: CacheSpec, files: Mapping[str, bytes]) -> None:
    """Check that laying a cache down writes over nothing but what a killed job left of one.

    Args:
        files: content of the files to be written, by name.

    Raises: UsageError naming what lies there; CacheError for a link.
    """
    for name in (*files, MANIFEST_NAME):
        if not _may_be_replaced(cache_path, name, spec, files.get(name)):
            raise UsageError(
                f"{cache_path / name} is there, and is no file of a cache that was begun; move it away, or choose another "
                "directory for the cache (--cache)"
            )
    for name in array_layouts(spec):
        check_no_links(cache_path, cache_path / name / "c")
        if is_there(cache_path / name / METADATA_NAME):
            continue
        shard = next((found for found in sorted(names_in(cache_path / name)) if _SHARD.match(found)), None)
        if shard is not None:
            raise UsageError(
                f"{cache_path / name}/{shard} is there, and no {METADATA_NAME} says of what array; move it away, or choose "
                "another directory for the cache (--cache)"
            )


def _may_be_replaced(cache_path: Path, name: str, spec: CacheSpec, content: bytes | None) -> bool:
    try:
        found = read_limited(cache_path / name, file_limit(name, spec))
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, CacheError):
        return False
    return found == content or _is_ours(name, found)


def _is_ours(name: str, found: bytes) -> bool:
    """Whether a file has the form that our writers give it, which others of that name have not."""
    if name == PROJECTIONS_NAME:
        return b'.norm_eps"' in found[: 1 << 20] and b'.norm_weight"' in found[: 1 << 20]
    with contextlib.suppress(CacheError, ValueError, TypeError, AttributeError):
        if name == CLIPS_NAME:
            return clips_lines(ClipTable(found, name)) == found != b""
        content = parse_json(found)
        if name in _ENTRIES:
            return _ENTRIES[name] <= content.keys() and digest_matches(content, found)
        return ATTRIBUTE in content["attributes"]
    return False
