"""The form of an index: its head, its sections, and the tables in them.

Numbers are little-endian. A block's row has, of each array in the order of `array_layouts`, its file's size (8 bytes) and
sha256 (32 bytes), then sizes and checksums of all chunks (4 bytes each).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evl_cache.canonical_json import digest, signed_json
from evl_cache.errors import CacheDamaged
from evl_cache.spec import CacheSpec
from evl_cache.store.format.layout import array_layouts
from evl_cache.store.format.marks import ShardFiles
from evl_cache.store.shards.shard import ShardRecord
from evl_cache.untrusted.json_text import parse_json

INDEX_NAME = "index.bin"
SEGMENTS_NAME = "segments"  # directory of the indexes of some blocks each, of a cache that is not complete
INDEX_VERSION = 1
MOST_TEXTS_NBYTES = 64 << 20  # parsed at every opening; reasons repeat, so ours have a few kilobytes
HEAD_NBYTES = 4096
# In the order of the file: what opening needs lies behind the large ones, and is read from elsewhere by one request.
SECTIONS = ("rows", "sources", "marks", "clips", "labels", "row_sums", "texts")
TABLES = "marks"  # where that begins
NONE = -1  # for a number that a record does not have

MARK = np.dtype([("digest", "u1", 32), ("sha256", "u1", 32), ("size", "<u8"), ("nbytes", "<u8")])
CLIP = np.dtype(
    [("error", "<i4"), ("decoder", "<i4"), ("height", "<i4"), ("width", "<i4"), ("frame_rule", "<i4")]
)
SOURCE = np.dtype([("nbytes", "<i8"), ("has_sha256", "<u8"), ("sha256", "u1", 32)])
LABEL, ROW_SUM = np.dtype("<i4"), np.dtype("<u4")
DTYPES = {"sources": SOURCE, "marks": MARK, "clips": CLIP, "labels": LABEL, "row_sums": ROW_SUM}
FILE_HEAD_NBYTES = 8 + 32  # of an array in a row: size and sha256
Table = NDArray[Any]


def row_nbytes(spec: CacheSpec) -> int:
    """Return the size of a block's row: of each array its file's size and digest, chunks' sizes and checksums."""
    return len(array_layouts(spec)) * (FILE_HEAD_NBYTES + 8 * num_chunks(spec))


def packed_row(files: ShardFiles, spec: CacheSpec) -> bytes:
    """Return a block's row. Raises: ValueError where a digest is none."""
    parts = []
    for name in array_layouts(spec):
        record = files[name]
        parts += [record.size.to_bytes(8, "little"), packed_digest(record.sha256)]
        parts += [record.packed_nbytes, record.packed_checksums]
    return b"".join(parts)


def unpacked_row(row: bytes, spec: CacheSpec) -> dict[str, ShardRecord]:
    """Return the records of shards in a block's row, by array."""
    at, count, found = 0, num_chunks(spec), {}
    for name in array_layouts(spec):
        sizes = at + FILE_HEAD_NBYTES
        checksums, stop = sizes + 4 * count, sizes + 8 * count
        found[name] = ShardRecord(
            size=int.from_bytes(row[at : at + 8], "little"),
            sha256=row[at + 8 : sizes].hex(),
            packed_nbytes=row[sizes:checksums],
            packed_checksums=row[checksums:stop],
        )
        at = stop
    return found


def packed_digest(sha256: str) -> bytes:
    """Return the 32 bytes of a digest in hexadecimal. Raises: ValueError for any other text."""
    packed = bytes.fromhex(sha256)
    if len(packed) != 32 or packed.hex() != sha256:
        raise ValueError(f"{sha256[:80]!r} is no sha256")
    return packed


def index_head(
    spec: CacheSpec,
    *,
    first: int,
    stop: int,
    cache_digest: str | None,
    sections: Mapping[str, tuple[int, int, str]],
    nbytes: int,
) -> bytes:
    """Return the head of an index: which blocks of which cache it holds, and where each section lies.

    Args:
        sections: place, size and sha256 by name; rows have a checksum each, and none of all.
        nbytes: of all shard files of its blocks: a list of caches needs no more of it.
    """
    content = {
        "version": INDEX_VERSION,
        "cache": cache_identity(spec),
        "cache_digest": cache_digest,
        "first": first,
        "stop": stop,
        "sections": {name: list(place) for name, place in sections.items()},
        "nbytes": nbytes,
    }
    written = signed_json(content)[0]
    assert len(written) <= HEAD_NBYTES
    return written.ljust(HEAD_NBYTES)


def cache_identity(spec: CacheSpec) -> str:
    """Return the digest of what ties an index to its cache: all that decides which blocks it has, and their files."""
    return digest([spec.feature_id, spec.content_id, list(spec.layers), spec.codec, spec.block_clips])


def parse_head(written: bytes, spec: CacheSpec, path: Path | str) -> dict[str, Any]:
    """Return the fields of a head. Raises: CacheDamaged where it is not intact, or of another cache or version."""
    try:
        content = parse_json(written)
        unsigned = {name: value for name, value in content.items() if name != "digest"}
        signed, own = signed_json(unsigned)
        if content["digest"] != own or signed.ljust(HEAD_NBYTES) != written:
            raise index_damaged(path, "has a head that does not match its digest")
        if (content["version"], content["cache"]) != (INDEX_VERSION, cache_identity(spec)):
            raise index_damaged(path, "is of another cache or version")
        if not all(type(content[name]) is int for name in ("first", "stop")):
            raise ValueError("blocks that are none")
        if not isinstance(content["cache_digest"], str | None):
            raise ValueError("a digest that is none")
        content["sections"] = {name: _parsed_place(*content["sections"][name]) for name in SECTIONS}
        if type(content["nbytes"]) is not int:
            raise ValueError("no size of the shards")
        return dict(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise index_damaged(path, f"has a head that cannot be read ({error!r})") from error


def _parsed_place(start: int, nbytes: int, sha256: str) -> tuple[int, int, str]:
    if type(start) is not int or type(nbytes) is not int or start < HEAD_NBYTES or nbytes < 0:
        raise ValueError("sections that are none")
    return start, nbytes, str(sha256)


def check_sections(head: Mapping[str, Any], spec: CacheSpec, path: Path | str) -> None:
    """Check that a head's sections have the sizes of its blocks, and lie one behind the other as they are written.

    Raises: CacheDamaged.
    """
    first, stop = head["first"], head["stop"]
    if type(first) is not int or type(stop) is not int or not 0 <= first < stop <= spec.num_blocks:
        raise index_damaged(path, f"holds blocks {str(first)[:20]} to {str(stop)[:20]}, not included")
    clips = min(stop * spec.block_clips, spec.num_clips) - first * spec.block_clips
    is_whole = head["cache_digest"] is not None
    counts = {
        "marks": stop - first,
        "clips": clips,
        "labels": clips * is_whole,
        "row_sums": stop - first,
        "sources": clips,
    }
    expected = {name: count * DTYPES[name].itemsize for name, count in counts.items()}
    expected["rows"] = (stop - first) * row_nbytes(spec)
    end = HEAD_NBYTES
    for name in SECTIONS:
        start, nbytes, _ = head["sections"][name]
        if start != end or nbytes != expected.get(name, nbytes):
            raise index_damaged(path, "has other sections than its blocks make up")
        end = start + nbytes


def index_nbytes(head: Mapping[str, Any]) -> int:
    """Return the size of the file of an index."""
    start, nbytes, _ = head["sections"][SECTIONS[-1]]
    return int(start + nbytes)


def index_damaged(path: Path | str, reason: str) -> CacheDamaged:
    """Return the error of an index that is not as it was written."""
    return CacheDamaged(f"{path}: {reason}; evl-cache index makes it again")


def num_chunks(spec: CacheSpec) -> int:
    """Return the number of chunks of a shard."""
    return spec.block_samples * len(spec.stored_layers)
