"""Complete caches of a size that no test could extract: everything is real but the features.

Description, `clips.jsonl`, marks, index and manifest are what an extraction of so many clips leaves; ids are like Kinetics's.
Features are of random numbers, with the arrays, layers and chunks of a ViT-B/16 cache but few tokens of few channels. Two
or three blocks of them are written by the store's own writer (a whole one, one with a clip that failed, and a short last
one); the shards of all other blocks are hard links to these, or copies where the disk has no links. So every block can be
read, is checked against its mark, and passes `verify`.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.support.large_sizes import Size, cache_spec, clip_list
from evl_cache.canonical_json import canonical_json
from evl_cache.clips import ClipList
from evl_cache.spec import CacheSpec
from evl_cache.store import (
    LOCKS_NAME,
    MANIFEST_NAME,
    BlockWriter,
    ClipRecord,
    LockWatcher,
    Mark,
    array_layouts,
    create_cache,
    make_row,
    mark_path,
    read_clips,
    read_description,
)
from evl_cache.store.disk.checksum import content_digest
from evl_cache.store.disk.publish import stage_file, write_atomic
from evl_cache.store.format.index_head import INDEX_NAME, SEGMENTS_NAME
from evl_cache.store.format.manifest import block_files, manifest_content
from evl_cache.store.format.marks import ShardFiles, mark_document
from evl_cache.store.writing.index_files import IndexWriter
from evl_cache.store.writing.segments import SEGMENT_BLOCKS, write_segment_of

FAILED_EVERY = 16  # one clip of every so many blocks failed: a hundredth of all
DECODER = "decord 0.6.0"
REASON = "moov atom not found (InvalidDataError); the file may have been cut off"
ENVIRONMENT = {"batch": 8, "device": "cpu", "dtype": "float32", "threads": 1, "torch": "2.8.0"}
_MOST_LINKS = 30_000  # ext4 takes 65,000 of one file
_SIZES = ((256, 340), (340, 256), (256, 454), (240, 320))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What a mark says of a clip's video: every clip has another."""

    nbytes: int
    sha256: str
    size: tuple[int, int]
    frames: int
    indices: str

    @classmethod
    def of(cls, row: int, clip_id: str, spec: CacheSpec) -> "_Source":
        texts = _frames_texts(spec.views.per_clip, spec.views.frames)
        return cls(
            nbytes=500_000 + row * 7919 % 1_000_000,
            sha256=hashlib.sha256(clip_id.encode()).hexdigest(),
            size=_SIZES[row % len(_SIZES)],
            frames=250 + row % 50,
            indices=texts[row % len(texts)],
        )


@lru_cache(maxsize=4)
def _frames_texts(views: int, frames: int) -> tuple[str, ...]:
    """Frame numbers of 64 clips, as JSON."""
    starts = np.random.default_rng(0).integers(0, 100, (64, views, 1))
    return tuple(json.dumps(rows.tolist(), separators=(",", ":")) for rows in starts + 16 * np.arange(frames))


def write_large_cache(path: Path, size: Size) -> CacheSpec:
    """Write a complete cache of this size. Returns: its spec."""
    clips = clip_list(size)
    spec = cache_spec(size, clips)
    create_cache(path, spec, clips.clips, origin={}, created_with={"evl-cache": "generated"})
    ids = [clip.id for clip in clips.clips]
    files: dict[str, tuple[int, str]] = {}
    with TemporaryDirectory(dir=path.parent, prefix=".blocks-") as folder, stage_file(path) as staged:
        kinds = _kinds(Path(folder), spec)
        index = IndexWriter(staged, spec, first=0)
        for block in range(spec.num_blocks):
            kind = kinds[_kind_of(block, spec)]
            kind.place(path, block)
            mark, written = kind.mark(block, ids, spec)
            with mark_path(path, block).open("xb") as out:
                out.write(written)
            index.add(mark)
            files |= block_files(mark, spec)
        content, manifest = manifest_content(path, spec, files)
        labels = read_clips(path, read_description(path)).labels
        index.finish(cache_digest=manifest.digest, labels=labels)
        staged.publish_replacing(path / INDEX_NAME)
    write_atomic(path / MANIFEST_NAME, content)
    return spec


def make_unfinished(path: Path, spec: CacheSpec, segments: Path | None) -> None:
    """Put a complete cache back to where an extraction has just done the last block.

    Args:
        segments: where its segments are kept for the next time, which are made if they are not there; None for a cache
            whose extraction left none.
    """
    for name in (MANIFEST_NAME, INDEX_NAME):
        (path / name).unlink(missing_ok=True)
    own = path / SEGMENTS_NAME
    shutil.rmtree(own, ignore_errors=True)
    if segments is None:
        return
    if not segments.exists():
        for block in range(0, spec.num_blocks, SEGMENT_BLOCKS):
            write_segment_of(path, spec, block)
        own.mkdir(exist_ok=True)  # a small cache has none
        shutil.copytree(own, segments, copy_function=os.link)
        return
    shutil.copytree(segments, own, copy_function=os.link)


def _kind_of(block: int, spec: CacheSpec) -> str:
    if len(spec.clips_of_block(block)) < spec.block_clips:
        return "short"
    return "failed" if block % FAILED_EVERY == 1 else "whole"


class _Kind:
    """Blocks of one kind, which have the same shards.

    Args:
        source: the cache that holds one of them.
        block: its number there.
        failed: places of clips that failed.
    """

    def __init__(self, source: Path, block: int, mark: Mark, failed: Sequence[int], spec: CacheSpec) -> None:
        self.files: ShardFiles = mark.files
        self.failed = frozenset(failed)
        self.layouts = array_layouts(spec)
        self._sources = {name: layout.shard(source, block) for name, layout in self.layouts.items()}
        self._links = 0
        # All of a mark but its number and its clips.
        content = mark_document(replace(mark, block=0, clips=()), spec)
        del content["digest"]
        text = canonical_json(content).removesuffix(b"\n")
        head = b'{"block":0,"clips":['
        assert text.startswith(head)
        self._before_digest, environment, rest = text[len(head) :].partition(b'"environment":')
        self._after_digest = environment + rest

    def place(self, path: Path, block: int) -> None:
        """Give the block its shards."""
        self._links += 1
        for name, layout in self.layouts.items():
            target = str(path / layout.shard_name(block))
            if self._links % _MOST_LINKS == 0:
                copied = self._sources[name].with_name(f"copy-{self._links}")
                shutil.copyfile(self._sources[name], copied)
                self._sources[name] = copied
            try:
                _link(self._sources[name], target)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                _link(self._sources[name], target)

    def mark(self, block: int, ids: Sequence[str], spec: CacheSpec) -> tuple[Mark, bytes]:
        """The block's mark without numbers of frames, and its bytes: those of `mark_content`, in much less time."""
        clips, records = [], []
        for place, row in enumerate(spec.clips_of_block(block)):
            clip_id = ids[row]
            if place in self.failed:
                records.append(ClipRecord(id=clip_id, error=REASON))
                clips.append(
                    f'{{"decoder":null,"error":"{REASON}","frame_count":null,"frame_size":null,"id":"{clip_id}",'
                    '"indices":null,"source_bytes":null,"source_sha256":null}'
                )
                continue
            source = _Source.of(row, clip_id, spec)
            records.append(
                ClipRecord(
                    id=clip_id,
                    source_bytes=source.nbytes,
                    source_sha256=source.sha256,
                    frame_size=source.size,
                    decoder=DECODER,
                )
            )
            clips.append(
                f'{{"decoder":"{DECODER}","error":null,"frame_count":{source.frames},'
                f'"frame_size":[{source.size[0]},{source.size[1]}],"id":"{clip_id}","indices":{source.indices},'
                f'"source_bytes":{source.nbytes},"source_sha256":"{source.sha256}"}}'
            )
        start = f'{{"block":{block},"clips":[{",".join(clips)}'.encode() + self._before_digest
        own = hashlib.sha256(start + self._after_digest).hexdigest()
        written = b"".join((start, f'"digest":"{own}",'.encode(), self._after_digest, b"\n"))
        mark = Mark(
            block=block,
            files=self.files,
            clips=tuple(records),
            environment=ENVIRONMENT,
            digest=own,
            file_digest=content_digest(written),
        )
        return mark, written


def _kinds(folder: Path, spec: CacheSpec) -> dict[str, _Kind]:
    """Write a block of each kind, and say what its marks and shards are in a cache of this spec."""
    short = spec.num_clips % spec.block_clips
    size = Size(clips=2 * spec.block_clips + short, views=spec.views.per_clip, changes={}, split=spec.split)
    clips = clip_list(size)
    small = replace(spec, num_clips=size.clips, content_id=clips.content_id)
    path = folder / "blocks"
    create_cache(path, small, clips.clips, origin={}, created_with={})
    generator = torch.Generator().manual_seed(0)
    locks = LockWatcher(path / LOCKS_NAME)
    kinds = {}
    with ThreadPoolExecutor(1) as encoders:
        for block, (name, failed) in enumerate((("whole", ()), ("failed", (1,)), ("short", ()))):
            if block == small.num_blocks:
                break
            failed = tuple(place for place in failed if place < spec.block_clips)
            lock = locks.take(block)
            assert lock is not None
            with lock:
                mark = _written(path, small, block, clips, failed, lock, encoders, generator)
            kinds[name] = _Kind(path, block, mark, failed, spec)
    return kinds


def _written(
    path: Path,
    spec: CacheSpec,
    block: int,
    clips: ClipList,
    failed: Sequence[int],
    lock: Any,
    encoders: ThreadPoolExecutor,
    generator: torch.Generator,
) -> Mark:
    writer = BlockWriter(path, spec, block, lock=lock, encoders=encoders)
    try:
        records = []
        for place, row in enumerate(spec.clips_of_block(block)):
            is_failed = place in failed
            records.append(ClipRecord(id=clips.clips[row].id, error=REASON if is_failed else None))
            for _ in range(spec.views.per_clip):
                writer.append(None if is_failed else make_row(*_features(spec, generator), spec))
        return writer.commit(records, ENVIRONMENT)
    finally:
        writer.close()


def _features(
    spec: CacheSpec, generator: torch.Generator
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    frames, tokens, width = spec.views.frames, spec.num_tokens, spec.tower.width
    of_layers = [torch.randn(frames, tokens, width, generator=generator) for _ in spec.layers]
    if not spec.has_maps:
        return of_layers, None
    shape = (2, frames - 1, tokens - 1, tokens - 1)
    return of_layers, [torch.softmax(torch.randn(shape, generator=generator), dim=-1) for _ in spec.layers]


def _link(source: Path, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        shutil.copyfile(source, target)  # a disk without links
