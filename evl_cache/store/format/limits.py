"""How large the files that describe a cache may be: what its writers keep to, and what its readers take.

Readers read these files whole, and parsing takes several times their size, so a stranger's file needs a limit. It follows
from the spec, which is read first and has a fixed limit. `check_limits` refuses a cache that could outgrow the readers
before anything is written of it: writer and reader take their numbers from here.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from evl_cache.clips import MAX_CLASSES, Clip
from evl_cache.errors import CacheError, UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store.format.layout import (
    CLIPS_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    RECOVERY_NAME,
    array_layouts,
    mark_name,
)
from evl_cache.store.shards.metadata import METADATA_NAME

MOST_DESCRIPTION_NBYTES = 16 << 20
# (least, most): the first is what every version took from every cache, so that older ones are read as before. Beyond
# the second no spec raises a limit: parsed, a file of that size takes a few gigabytes.
_MANIFEST_NBYTES = (64 << 20, 512 << 20)
_MARK_NBYTES = (64 << 20, 256 << 20)
MOST_CLIPS_NBYTES = 1 << 30
_PROJECTIONS_NBYTES = (1 << 20, 4 << 30)

_ROW_NBYTES = 112  # of a manifest's row beside the name: digest, size of up to 20 digits, keys
_HEAD_NBYTES = 64 << 10  # of a mark or manifest beside rows: ids, versions, names of devices
_CHUNK_NBYTES = 16  # of a mark: size and checksum, hexadecimal
_CLIP_NBYTES = 1 << 10  # of a clip's record beside id, reason and frame numbers; of a line of `clips.jsonl`
_INDEX_NBYTES = 21  # of a frame's number, up to 20 digits and a comma
MOST_REASON_NBYTES = 4000  # of why a clip failed, as JSON: decoders may have much to say
_REMEDIES = {
    CLIPS_NAME: "split the list of clips, or shorten their names",
    RECOVERY_NAME: "split the list of clips, or shorten their names",
    PROJECTIONS_NAME: "keep fewer --layers, or use --maps uint8",
}


def file_limit(name: str, spec: CacheSpec) -> int:
    """Return how many bytes the file of a cache that is called `name` (relative, not a shard) may have."""
    if name == MANIFEST_NAME:
        return manifest_limit(spec)
    if name == PROJECTIONS_NAME:
        return projections_limit(spec)
    if name in (CLIPS_NAME, RECOVERY_NAME):
        return clips_limit(spec)
    if name.rpartition("/")[2] == METADATA_NAME:
        return MOST_DESCRIPTION_NBYTES
    return mark_limit(spec)


def manifest_limit(spec: CacheSpec) -> int:
    """Return how many bytes `manifest.json` may have: a row for each file."""
    return _within(_MANIFEST_NBYTES, _manifest_nbytes(spec))


def mark_limit(spec: CacheSpec) -> int:
    """Return how many bytes a block's mark may have: numbers for each chunk, and a record for each clip."""
    names_nbytes = spec.block_clips * _CLIP_NBYTES
    return _within(_MARK_NBYTES, _mark_nbytes(spec, names_nbytes))


def clips_limit(spec: CacheSpec) -> int:
    """Return how many bytes `clips.jsonl` may have, and its second copy with the description."""
    return _within((256 << 20, MOST_CLIPS_NBYTES), spec.num_clips * _CLIP_NBYTES + MOST_DESCRIPTION_NBYTES)


def projections_limit(spec: CacheSpec) -> int:
    """Return how many bytes `recompute.safetensors` may have: float32 at most, and its header."""
    return _within(_PROJECTIONS_NBYTES, 2 * projections_nbytes(spec) + (1 << 20))


def projections_nbytes(spec: CacheSpec) -> int:
    """Return the size of `recompute.safetensors` without its header; 0 where there is none."""
    width = spec.tower.width
    return len(spec.layers) * (2 * width * width * 2 + 4 * width * 4 + 8) if spec.recomputes_maps else 0


def check_limits(spec: CacheSpec, *, clip_lines: bytes, files: Mapping[str, bytes]) -> None:
    """Check that readers will take every file of a cache that is about to be made.

    Args:
        clip_lines: the bytes of `clips.jsonl`.
        files: content of the files that describe it, by name.

    Raises: UsageError naming what is too large, and what to do.
    """
    try:
        CacheSpec.from_json(spec.to_json())
    except CacheError as error:
        raise UsageError(f"no cache of this could be read again: {error}") from error
    for name, content in files.items():
        if len(content) > (limit := file_limit(name, spec)):
            remedy = _REMEDIES.get(name, "give fewer or shorter names of classes")
            raise UsageError(
                f"{name} would have {len(content)} bytes, and no reader takes more than {limit}: {remedy}"
            )
    if (nbytes := _manifest_nbytes(spec)) > (limit := manifest_limit(spec)):
        raise UsageError(
            f"{spec.num_clips} clips with {spec.views.per_clip} views are {spec.num_blocks} blocks, whose "
            f"{MANIFEST_NAME} may have {nbytes} bytes, and no reader takes more than {limit}: split the list of "
            "clips into several caches, or take fewer views"
        )
    count, names_nbytes = spec.block_clips, _most_nbytes(clip_lines, spec.block_clips)
    if (nbytes := _mark_nbytes(spec, names_nbytes)) > (limit := mark_limit(spec)):
        raise UsageError(
            f"the mark of a block of {count} clips with {spec.views.per_clip} views of {spec.views.frames} frames may "
            f"have {nbytes} bytes, and no reader takes more than {limit}: take fewer views, frames or layers, or shorten "
            "the clips' names"
        )


def check_labels(spec: CacheSpec, clips: Sequence[Clip]) -> None:
    """Check that readers will take the labels of a list. Raises: UsageError."""
    classes = min(len(spec.classes), MAX_CLASSES)
    wrong = next((clip for clip in clips if not 0 <= clip.label < classes), None)
    if wrong is not None:
        raise UsageError(
            f"clip {wrong.id[:100]!r} has label {wrong.label}; expected 0 to {classes - 1}: the list has "
            f"{len(spec.classes)} classes, of which readers take {MAX_CLASSES} at most"
        )


def shortened_reason(reason: str) -> str:
    """Return why a clip failed so that it fits into a mark: cut off at its end where it is very long."""
    if len(reason) <= MOST_REASON_NBYTES // 6:  # the longest escape of a character
        return reason
    kept = reason[:MOST_REASON_NBYTES]
    while (
        len(json.dumps(kept, ensure_ascii=False).encode(errors="backslashreplace")) > MOST_REASON_NBYTES - 8
    ):
        kept = kept[: len(kept) * 7 // 8]
    return reason if kept == reason else f"{kept} …"


def _most_nbytes(lines: bytes, count: int) -> int:
    """Return how many bytes the largest `count` lines one after another have, of those that begin a block."""
    ends = np.flatnonzero(np.frombuffer(lines, dtype=np.uint8) == ord("\n")) + 1
    of_blocks = np.append(ends[count - 1 :: count], len(lines))
    return int(np.diff(of_blocks, prepend=0).max())


def _manifest_nbytes(spec: CacheSpec) -> int:
    """Return what a manifest has at most."""
    last = spec.num_blocks - 1
    names = [mark_name(last), *(layout.shard_name(last) for layout in array_layouts(spec).values())]
    return _HEAD_NBYTES + spec.num_blocks * sum(len(name) + _ROW_NBYTES for name in names)


def _mark_nbytes(spec: CacheSpec, names_nbytes: int) -> int:
    """Return what a mark has at most whose clips' names take so many bytes as JSON."""
    chunks = spec.block_samples * len(spec.stored_layers) * len(array_layouts(spec))
    indices = spec.views.per_clip * (spec.views.frames * _INDEX_NBYTES + 3)
    of_clips = spec.block_clips * (_CLIP_NBYTES + MOST_REASON_NBYTES + indices) + names_nbytes
    return _HEAD_NBYTES + chunks * _CHUNK_NBYTES + of_clips


def _within(bounds: tuple[int, int], nbytes: int) -> int:
    least, most = bounds
    return min(max(nbytes, least), most)
