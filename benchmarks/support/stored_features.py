"""Rows and caches of generated features at ViT-B/16's sizes, for the store's benchmarks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.outlier_features import outlier_features, softmax_maps
from evl_cache.clips import Clip, ClipList
from evl_cache.spec import CacheSpec, TowerSpec, ViewSpec
from evl_cache.store import (
    LOCKS_NAME,
    BlockLock,
    BlockWriter,
    ClipRecord,
    LockWatcher,
    Row,
    create_cache,
    make_row,
)
from evl_cache.store.writing.completion import write_manifest

LAYERS = (8, 9, 10, 11, 12)
VIT_B_16 = TowerSpec(
    model="generated",
    pretrained="none",
    weights_sha256="0" * 64,
    image_size=224,
    patch_size=16,
    width=768,
    blocks=12,
    heads=12,
    quick_gelu=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def clip_list(count: int) -> ClipList:
    """Clips that have no files."""
    clips = tuple(Clip(id=f"{i:05d}", path=f"{i:05d}.mp4", label=i % 2, split="train") for i in range(count))
    return ClipList(clips=clips, classes=("a", "b"), source="generated")


def cache_spec(clips: ClipList, *, codec: str = "default", block_clips: int = 64) -> CacheSpec:
    """ViT-B/16, 8 frames, five layers, int8 tokens and uint8 maps."""
    return CacheSpec(
        dataset="generated",
        split="train",
        classes=clips.classes,
        tower=VIT_B_16,
        views=ViewSpec(),
        layers=LAYERS,
        tokens="int8",
        maps="uint8",
        codec=codec,
        compute_dtype="float32",
        num_clips=len(clips.clips),
        content_id=clips.content_id,
        block_clips=block_clips,
    )


def generated_rows(count: int, *, seed: int = 0) -> list[Row]:
    """Quantised rows of generated features, CLIP-like (`benchmarks.outlier_features`)."""
    spec = cache_spec(clip_list(count))
    rows = []
    for clip in range(count):
        tokens = outlier_features(clips=1, seed=seed + clip).tokens[0]
        maps = softmax_maps(clips=1, seed=seed + clip)[0]
        rows.append(make_row(list(tokens), list(maps), spec))
    return rows


def write_rows(
    directory: Path, rows: list[Row], *, samples: int, codec: str, block_clips: int = 64, threads: int = 2
) -> CacheSpec:
    """A complete cache of `samples` rows, taken from `rows` again and again."""
    clips = clip_list(samples)
    spec = cache_spec(clips, codec=codec, block_clips=block_clips)
    create_cache(directory, spec, clips.clips, origin={}, created_with={})
    locks = LockWatcher(directory / LOCKS_NAME)
    with ThreadPoolExecutor(threads) as encoders, ThreadPoolExecutor(1) as committer:
        commits = []
        for block in range(spec.num_blocks):
            lock = locks.take(block)
            assert lock is not None
            writer = BlockWriter(directory, spec, block, lock=lock, encoders=encoders)
            for row in spec.clips_of_block(block):
                writer.append(rows[row % len(rows)])
            records = [ClipRecord(id=clips.clips[row].id) for row in spec.clips_of_block(block)]
            # As in stage one: a block is committed while the next one is written.
            commits.append(committer.submit(_commit, writer, records, lock))
        for commit in commits:
            commit.result()
    write_manifest(directory, spec)
    return spec


def _commit(writer: BlockWriter, records: list[ClipRecord], lock: BlockLock) -> None:
    with lock:
        writer.commit(records, {})
        writer.close()


def stored_nbytes(directory: Path, arrays: tuple[str, ...]) -> int:
    """Bytes of the shards of some arrays."""
    return sum(f.stat().st_size for name in arrays for f in (directory / name).glob("c.*"))


def as_bytes(row: Row) -> int:
    """Decoded bytes of a row."""
    return sum(np.asarray(array).nbytes for array in row.values())
