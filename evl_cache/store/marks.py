"""The done mark of a block binds position, bytes and sources. Without a valid one a block does not exist."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.errors import CacheDamaged
from evl_cache.spec import CacheSpec, digest
from evl_cache.store.layout import array_layouts, mark_path
from evl_cache.store.objects import read_limited
from evl_cache.store.shard import ShardRecord

MARK_VERSION = 1
MOST_MARK_NBYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """What became of one clip.

    Attributes:
        id: as in the clip list.
        error: why it has no features; None where it has.
        source_bytes, source_sha256: of the video file; None where it could not be read.
        frame_size: (height, width) in pixels; frame_count: as decoded; indices: (views, T) frame numbers.
        decoder: library and version that served.
    """

    id: str
    error: str | None = None
    source_bytes: int | None = None
    source_sha256: str | None = None
    frame_size: tuple[int, int] | None = None
    frame_count: int | None = None
    indices: tuple[tuple[int, ...], ...] | None = None
    decoder: str | None = None


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One shard file: size in bytes, sha256, and of each chunk the stored size and checksum.

    The chunks' numbers stay packed, little-endian uint32: a large cache has millions of them.
    """

    size: int
    sha256: str
    chunk_nbytes: bytes
    chunk_checksums: bytes

    @classmethod
    def of(cls, record: ShardRecord) -> "FileRecord":
        """The record that a mark keeps of a written shard."""
        return cls(
            size=record.size,
            sha256=record.sha256,
            chunk_nbytes=np.asarray(record.chunk_nbytes, dtype="<u4").tobytes(),
            chunk_checksums=np.asarray(record.chunk_checksums, dtype="<u4").tobytes(),
        )

    @property
    def checksums(self) -> np.ndarray[Any, Any]:
        """uint32 (chunks,)."""
        return np.frombuffer(self.chunk_checksums, dtype="<u4")


ShardFiles = Mapping[str, FileRecord]  # by array, of one block


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One finished block.

    Attributes:
        block: its number.
        files: array name -> record of its shard.
        clips: a record for each clip of the block, in order.
        environment: batch, device, dtype, threads and versions: bytes are identical where these are equal.
        digest: of the mark itself.
    """

    block: int
    files: Mapping[str, FileRecord]
    clips: tuple[ClipRecord, ...]
    environment: Mapping[str, Any]
    digest: str = ""


def mark_document(mark: Mark, spec: CacheSpec) -> dict[str, Any]:
    """The JSON of a mark, its own digest included."""
    layouts = array_layouts(spec)
    content = {
        "version": MARK_VERSION,
        "feature_id": spec.feature_id,
        "content_id": spec.content_id,
        "layers": list(spec.layers),
        "block": mark.block,
        "files": {name: _file_document(mark.files[name]) for name in layouts},
        "clips": [asdict(clip) for clip in mark.clips],
        "environment": dict(mark.environment),
    }
    content = json.loads(json.dumps(content))
    return {**content, "digest": digest(content)}


def read_mark(root: Path, block: int, spec: CacheSpec) -> Mark | None:
    """The mark of a block; None where there is none.

    Raises: CacheDamaged for a mark that is not intact, or belongs to another block or cache.
    """
    path = mark_path(root, block)
    try:
        written = read_limited(path, MOST_MARK_NBYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheDamaged(f"{path}: not a done mark ({error}); repair the cache") from error
    return parse_mark(written, path, block, spec)


def parse_mark(written: bytes, path: str | Path, block: int, spec: CacheSpec) -> Mark:
    """The mark of a file's bytes. Raises: as `read_mark`."""
    try:
        content = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise CacheDamaged(f"{path}: not a done mark ({error}); repair the cache") from error
    if not isinstance(content, dict) or not _digest_matches(content, written):
        raise CacheDamaged(f"{path}: the mark's own digest does not match; repair the cache")
    return _parse(content, path, block, spec)


def _digest_matches(content: Mapping[str, Any], written: bytes) -> bool:
    stored = content.get("digest")
    # As written, the digest is that of the bytes without it: half the time of encoding the content again.
    without = written.removesuffix(b"\n").replace(f'"digest":"{stored}",'.encode(), b"", 1)
    if hashlib.sha256(without).hexdigest() == stored:
        return True
    return digest({name: value for name, value in content.items() if name != "digest"}) == stored


def _parse(content: Mapping[str, Any], path: str | Path, block: int, spec: CacheSpec) -> Mark:
    expected = {
        "version": MARK_VERSION,
        "feature_id": spec.feature_id,
        "content_id": spec.content_id,
        "layers": list(spec.layers),
        "block": block,
    }
    for name, value in expected.items():
        if content.get(name) != value:
            raise CacheDamaged(
                f"{path}: {name} is {content.get(name)!r}, expected {value!r}: "
                "the mark is of another block or cache; repair the cache"
            )
    try:
        chunks = spec.block_samples * len(spec.stored_layers)
        files = {name: _parse_file(content["files"][name], chunks) for name in array_layouts(spec)}
        clips = tuple(ClipRecord(**row) for row in content["clips"])
    except (KeyError, TypeError, ValueError) as error:
        raise CacheDamaged(f"{path}: incomplete ({error!r}); repair the cache") from error
    if len(clips) != len(spec.clips_of_block(block)):
        raise CacheDamaged(
            f"{path}: names {len(clips)} clips, the block has {len(spec.clips_of_block(block))}; repair"
        )
    return Mark(
        block=block, files=files, clips=clips, environment=content["environment"], digest=content["digest"]
    )


def _file_document(record: FileRecord) -> dict[str, Any]:
    # Hexadecimal: a third of the size of JSON numbers, and fast to parse.
    return {
        "size": record.size,
        "sha256": record.sha256,
        "chunk_nbytes": record.chunk_nbytes.hex(),
        "chunk_checksums": record.chunk_checksums.hex(),
    }


def _parse_file(content: Mapping[str, Any], num_chunks: int) -> FileRecord:
    def unpacked(text: str) -> bytes:
        values = bytes.fromhex(text)
        if len(values) != 4 * num_chunks:
            raise ValueError(f"{len(values) // 4} chunks, expected {num_chunks}")
        return values

    return FileRecord(
        size=int(content["size"]),
        sha256=str(content["sha256"]),
        chunk_nbytes=unpacked(content["chunk_nbytes"]),
        chunk_checksums=unpacked(content["chunk_checksums"]),
    )
