"""Caches of generated features at the sizes of `benchmarks.device`, written through the store."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.support.device_place import Sizes
from evl_cache.clips import Clip, ClipList
from evl_cache.spec import CacheSpec, TowerSpec, ViewSpec
from evl_cache.store import (
    LOCKS_NAME,
    BlockLock,
    BlockWriter,
    ClipRecord,
    FeatureCache,
    LockWatcher,
    Row,
    create_cache,
    make_row,
)
from evl_cache.store.writing.completion import write_manifest

_PATCH = 16  # pixels
_BLOCK_CLIPS = 64
_THREADS = 4


def generated_spec(sizes: Sizes, clips: ClipList, *, split: str, codec: str = "default") -> CacheSpec:
    """The spec of a cache whose layers are the decoder's, and one more below."""
    depth = sizes.layers + 1
    side = sizes.grid[0] * _PATCH
    tower = TowerSpec(
        model="generated",
        pretrained="none",
        weights_sha256="0" * 64,
        image_size=side,
        patch_size=_PATCH,
        width=sizes.width,
        blocks=depth,
        heads=sizes.heads,
        quick_gelu=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    return CacheSpec(
        dataset="generated",
        split=split,
        classes=clips.classes,
        tower=tower,
        views=ViewSpec(frames=sizes.frames),
        layers=tuple(range(1, depth + 1)),
        tokens="int8",
        maps="uint8",
        codec=codec,
        compute_dtype="float32",
        num_clips=len(clips.clips),
        content_id=clips.content_id,
        block_clips=_BLOCK_CLIPS,
    )


def write_generated(
    path: Path, sizes: Sizes, *, samples: int, distinct: int = 8, split: str = "train", codec: str = "default"
) -> FeatureCache:
    """Write a complete cache of `samples` clips of two classes, whose features are those of a few again and again.

    The grid must be square, as towers have it.
    """
    clips = ClipList(
        clips=tuple(
            Clip(id=f"{split}{i:05d}", path=f"{split}{i:05d}.mp4", label=i % 2, split=split)
            for i in range(samples)
        ),
        classes=("a", "b"),
        source="generated",
    )
    spec = generated_spec(sizes, clips, split=split, codec=codec)
    rows = [
        _row(spec, seed=number + (1000 if split == "val" else 0)) for number in range(min(distinct, samples))
    ]
    create_cache(path, spec, clips.clips, origin={}, created_with={})
    locks = LockWatcher(path / LOCKS_NAME)
    with ThreadPoolExecutor(_THREADS) as encoders, ThreadPoolExecutor(1) as committer:
        commits = []
        for block in range(spec.num_blocks):
            lock = locks.take(block)
            assert lock is not None
            writer = BlockWriter(path, spec, block, lock=lock, encoders=encoders)
            for row in spec.clips_of_block(block):
                writer.append(rows[row % len(rows)])
            records = [ClipRecord(id=clips.clips[row].id) for row in spec.clips_of_block(block)]
            commits.append(committer.submit(_commit, writer, records, lock))
        for commit in commits:
            commit.result()
    write_manifest(path, spec)
    return FeatureCache(path)


def _row(spec: CacheSpec, *, seed: int) -> Row:
    """A clip's features; one channel tells its class."""
    generator = torch.Generator().manual_seed(seed)
    T, N, C = spec.views.frames, spec.num_tokens, spec.tower.width
    tokens, maps = [], []
    for _ in spec.layers:
        values = torch.randn(T, N, C, generator=generator)
        values[..., 0] += 4.0 * (seed % 2)
        tokens.append(values)
        maps.append(torch.softmax(3 * torch.randn(2, T - 1, N - 1, N - 1, generator=generator), dim=-1))
    return make_row(tokens, maps, spec)


def _commit(writer: BlockWriter, records: list[ClipRecord], lock: BlockLock) -> None:
    with lock:
        writer.commit(records, {})
        writer.close()
