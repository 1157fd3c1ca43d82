"""The done mark of a block binds position, bytes and sources. Without a valid one a block does not exist."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.canonical_json import canonical_json, digest, digest_matches
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.extract_options import MOST_BATCH
from evl_cache.spec import FRAME_RULE, CacheSpec
from evl_cache.store.disk.checksum import content_digest
from evl_cache.store.disk.file_system import check_no_links, is_refusal, read_limited
from evl_cache.store.format.layout import ArrayLayout, array_layouts, mark_path
from evl_cache.store.format.limits import mark_limit, shortened_reason
from evl_cache.store.shards.shard import ShardRecord
from evl_cache.untrusted.json_text import parse_json

MARK_VERSION = 1
UNKNOWN_DECODER = "unknown"  # of clips whose mark names none
_LARGE_NBYTES, _MOST_EXPANSION = 16 << 20, 1000
_EXPANSION_OF_A_FRAME = 4  # of a video that stands still all frames after the first are the same


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """What became of one clip.

    Attributes:
        id: as in the clip list.
        error: why it has no features; None where it has.
        source_bytes: size of the video file; None where it could not be read.
        source_sha256: digest of the video file; None where it could not be read.
        frame_size: (height, width) in pixels.
        frame_count: frames of the video, as decoded.
        indices: (views, T) frame numbers.
        decoder: library and version that served.
        frame_rule: by which rule its frames were chosen, or are known to be the same as chosen; None for the cache's own.
    """

    id: str
    error: str | None = None
    source_bytes: int | None = None
    source_sha256: str | None = None
    frame_size: tuple[int, int] | None = None
    frame_count: int | None = None
    indices: tuple[tuple[int, ...], ...] | None = None
    decoder: str | None = None
    frame_rule: int | None = None

    def is_by_older_rule(self, spec: CacheSpec) -> bool:
        """Whether the clip has features, of a cache with this spec, whose frames a rule before this version's chose."""
        return self.error is None and (self.frame_rule or spec.frame_rule) < FRAME_RULE


ShardFiles = Mapping[str, ShardRecord]  # by array, of one block


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One finished block.

    Attributes:
        block: its number.
        files: record of each array's shard, by the array's name.
        clips: a record for each clip of the block, in order.
        environment: batch, device, dtype, threads and versions: bytes are identical where these are equal.
        digest: of the mark itself.
        file_digest: size and sha256 of the file that the mark was read from, which the manifest names.
    """

    block: int
    files: ShardFiles
    clips: tuple[ClipRecord, ...]
    environment: Mapping[str, Any]
    digest: str = ""
    file_digest: tuple[int, str] = (0, "")


def mark_document(mark: Mark, spec: CacheSpec) -> dict[str, Any]:
    """Return the JSON of a mark, its own digest included."""
    content = _head(spec, mark.block) | {
        "files": {name: _file_document(mark.files[name]) for name in array_layouts(spec)},
        "clips": [_clip_document(clip) for clip in mark.clips],
        "environment": dict(mark.environment),
    }
    if any(clip.frame_rule is not None for clip in mark.clips):
        # Beside the records, not in them: versions that know no rules read such marks, too.
        content["frame_rules"] = [clip.frame_rule for clip in mark.clips]
    content = json.loads(json.dumps(content))
    return {**content, "digest": digest(content)}


def mark_content(mark: Mark, spec: CacheSpec) -> bytes:
    """Return the bytes of a mark. Raises: CacheError for one that no reader would take: it must not be written."""
    content = canonical_json(mark_document(mark, spec))
    try:
        parse_mark(content, "its mark", mark.block, spec)
        if len(content) > mark_limit(spec):
            raise CacheDamaged(f"{len(content)} bytes, readers take {mark_limit(spec)}")
    except CacheDamaged as error:
        raise CacheError(
            f"block {mark.block} cannot be marked as done: no reader would take the mark ({error}); please report this"
        ) from error
    return content


def mark_file_digest(mark: Mark, spec: CacheSpec) -> tuple[int, str]:
    """Return size and sha256 of the file that a mark is written to."""
    return content_digest(canonical_json(mark_document(mark, spec)))


def _head(spec: CacheSpec, block: int) -> dict[str, Any]:
    """The fields that tie a mark to its block and cache."""
    return {
        "version": MARK_VERSION,
        "feature_id": spec.feature_id,
        "content_id": spec.content_id,
        "layers": list(spec.layers),
        "block": block,
    }


def read_mark(cache_path: Path, block: int, spec: CacheSpec) -> Mark | None:
    """Return the mark of a block; None where there is none.

    Raises: CacheDamaged for a mark that is not intact, or belongs to another block or cache.
    """
    written = read_mark_bytes(cache_path, block, spec)
    return None if written is None else parse_mark(written, mark_path(cache_path, block), block, spec)


def read_mark_bytes(cache_path: Path, block: int, spec: CacheSpec) -> bytes | None:
    """Return the bytes of a block's mark; None where there is none.

    Raises: CacheDamaged as `read_mark`; CacheError where the disk refuses: a block is not taken for undone then.
    """
    path = mark_path(cache_path, block)
    try:
        check_no_links(cache_path, path.parent)
        return read_limited(path, mark_limit(spec))
    except FileNotFoundError:
        return None
    except (OSError, CacheError) as error:
        if isinstance(error.__cause__, OSError) and is_refusal(error.__cause__):
            raise
        raise CacheDamaged(f"{path}: not a done mark ({error}); repair the cache") from error


def parse_mark(written: bytes, path: str | Path, block: int, spec: CacheSpec) -> Mark:
    """Return the mark in a file's bytes. Raises: as `read_mark`."""
    return mark_of(parse_document(written, path), written, path, block, spec)


def parse_document(written: bytes, path: str | Path) -> Any:
    """Return the JSON of a mark in a file's bytes. Raises: CacheDamaged."""
    try:
        return parse_json(written)
    except ValueError as error:
        raise CacheDamaged(f"{path}: not a done mark ({error}); repair the cache") from error


def mark_of(content: Any, written: bytes, path: str | Path, block: int, spec: CacheSpec) -> Mark:
    """Return the mark in a document, which `written` was read as. Raises: as `read_mark`."""
    if not isinstance(content, dict) or not digest_matches(content, written):
        raise CacheDamaged(f"{path}: the mark's own digest does not match; repair the cache")
    for name, value in _head(spec, block).items():
        if content.get(name) != value:
            raise CacheDamaged(
                f"{path}: {name} is {content.get(name)!r}, expected {value!r}: "
                "the mark is of another block or cache; repair the cache"
            )
    try:
        layouts = array_layouts(spec)
        files = {name: _parse_file(content["files"][name], layout, spec) for name, layout in layouts.items()}
        clips = _parse_clips(content["clips"], content.get("frame_rules"))
        environment = content["environment"]
        batch = environment.get("batch", 1)
        if not isinstance(batch, int) or not 1 <= batch <= MOST_BATCH:
            raise ValueError("its environment is none")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheDamaged(f"{path}: incomplete ({error!r}); repair the cache") from error
    if len(clips) != len(spec.clips_of_block(block)):
        raise CacheDamaged(
            f"{path}: names {len(clips)} clips, the block has {len(spec.clips_of_block(block))}; repair"
        )
    return Mark(
        block=block,
        files=files,
        clips=clips,
        environment=environment,
        digest=content["digest"],
        file_digest=content_digest(written),
    )


def _clip_document(clip: ClipRecord) -> dict[str, Any]:
    content = asdict(clip) | {"error": None if clip.error is None else shortened_reason(clip.error)}
    del content["frame_rule"]
    return content


def _file_document(record: ShardRecord) -> dict[str, Any]:
    # Hexadecimal: a third of the size of JSON numbers, and fast to parse.
    return {
        "size": record.size,
        "sha256": record.sha256,
        "chunk_nbytes": record.packed_nbytes.hex(),
        "chunk_checksums": record.packed_checksums.hex(),
    }


def _parse_file(content: Mapping[str, Any], layout: ArrayLayout, spec: CacheSpec) -> ShardRecord:
    num_chunks = spec.block_samples * len(spec.stored_layers)

    def unpacked(text: str) -> bytes:
        if len(text) != 8 * num_chunks:
            raise ValueError(f"{len(text) // 8} chunks, expected {num_chunks}")
        return bytes.fromhex(text)

    record = ShardRecord(
        size=int(content["size"]),
        sha256=str(content["sha256"]),
        packed_nbytes=unpacked(content["chunk_nbytes"]),
        packed_checksums=unpacked(content["chunk_checksums"]),
    )
    check_record(record, layout, spec)
    return record


def check_record(record: ShardRecord, layout: ArrayLayout, spec: CacheSpec) -> None:
    """Check that a file can be as its record says, which a stranger may have written. Raises: ValueError."""
    nbytes = record.chunk_nbytes.astype(np.uint64)
    if not np.all((nbytes == 0) | layout.codec.allows_size(nbytes, layout.chunk_nbytes)):
        raise ValueError(
            f"chunks of {layout.name} have sizes that none of {layout.chunk_nbytes} bytes can have"
        )
    if int(nbytes.sum()) > record.size:
        raise ValueError(f"chunks of {layout.name} are larger than their file")
    # No feature of a video compresses so far, and memory is made for large chunks.
    decoded = int((nbytes > 0).sum()) * layout.chunk_nbytes
    most = max(_MOST_EXPANSION, _EXPANSION_OF_A_FRAME * spec.views.frames)
    if layout.chunk_nbytes > _LARGE_NBYTES and decoded > most * record.size:
        raise ValueError(f"{record.size} bytes of {layout.name} would become {decoded}")


def _parse_clips(
    rows: Sequence[Mapping[str, Any]], frame_rules: Sequence[Any] | None
) -> tuple[ClipRecord, ...]:
    rules = [None] * len(rows) if frame_rules is None else list(frame_rules)
    if not all(rule is None or (type(rule) is int and rule > 0) for rule in rules):
        raise TypeError(f"rules of frames: {str(rules)[:40]}")
    return tuple(_parse_clip(row, rule) for row, rule in zip(rows, rules, strict=True))


def _parse_clip(row: Mapping[str, Any], frame_rule: int | None) -> ClipRecord:
    record = ClipRecord(**row, frame_rule=frame_rule)
    texts = (record.error, record.source_sha256, record.decoder)
    numbers = (record.source_bytes, record.frame_count, *(record.frame_size or ()))
    if (
        not isinstance(row["id"], str)
        or not all(text is None or isinstance(text, str) for text in texts)
        or not all(number is None or isinstance(number, int) for number in numbers)
        or (record.frame_size is not None and len(record.frame_size) != 2)
    ):
        raise TypeError(f"of clip {str(record.id)[:40]!r}: fields of other types")
    return record
