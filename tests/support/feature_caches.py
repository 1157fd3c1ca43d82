"""Small caches of random features, written through the store without videos or a tower."""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evl_cache.clips import Clip, ClipList
from evl_cache.spec import FRAME_RULE, SOFTWARE_PIXELS, CacheSpec, TowerSpec, ViewSpec
from evl_cache.store import (
    LOCKS_NAME,
    BlockWriter,
    ClipRecord,
    FeatureCache,
    LockWatcher,
    create_cache,
    make_row,
)
from evl_cache.store.writing.completion import write_manifest

TOWER = TowerSpec(
    model="tiny",
    pretrained="none",
    weights_sha256="12" * 32,
    image_size=16,
    patch_size=8,
    width=16,
    blocks=4,
    heads=2,
    quick_gelu=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
VIEWS = ViewSpec(frames=3, stride=2)


def clip_list(labels: Sequence[int], *, classes: int, prefix: str = "c", split: str = "train") -> ClipList:
    clips = tuple(
        Clip(id=f"{prefix}{i}", path=f"dir/{prefix}{i}.mp4", label=label, split=split)
        for i, label in enumerate(labels)
    )
    return ClipList(clips=clips, classes=tuple(f"class{i}" for i in range(classes)), source="test")


def cache_spec(clips: ClipList | None = None, *, classes: int = 3, **fields: Any) -> CacheSpec:
    """The spec of a cache of some clips; of thirteen by default."""
    clips = clips or clip_list([i % classes for i in range(13)], classes=classes)
    usual = {
        "dataset": "test",
        "split": "train",
        "tower": TOWER,
        "views": VIEWS,
        "layers": (2, 3, 4),
        "tokens": "int8",
        "maps": "uint8",
        "compute_dtype": "float32",
        "block_clips": 5,
    }
    return CacheSpec(
        classes=clips.classes,
        num_clips=len(clips.clips),
        content_id=clips.content_id,
        **{**usual, **fields},
    )


def write_cache(
    path: Path,
    *,
    labels: Sequence[int] = tuple(i % 3 for i in range(13)),
    classes: int = 3,
    names: tuple[str, ...] | None = None,
    tower: TowerSpec = TOWER,
    views: ViewSpec = VIEWS,
    layers: tuple[int, ...] = (2, 3, 4),
    tokens: str = "int8",
    maps: str = "uint8",
    codec: str = "default",
    failed: Collection[int] = (),
    block_clips: int = 5,
    prefix: str = "c",
    dataset: str = "test",
    split: str = "train",
    pixels: str = SOFTWARE_PIXELS,
    frame_rule: int = FRAME_RULE,
    seed: int = 0,
) -> FeatureCache:
    """Write a finished cache whose tokens carry their clip's class among noise.

    Args:
        names: of the classes, by label; caches whose labels mean the same names have the same features.
        failed: rows of failed clips.
    """
    clips = clip_list(labels, classes=classes, prefix=prefix, split=split)
    if names is not None:
        clips, classes = replace(clips, classes=names), len(names)
    spec = cache_spec(
        clips,
        dataset=dataset,
        split=split,
        tower=tower,
        views=views,
        layers=layers,
        tokens=tokens,
        maps=maps,
        codec=codec,
        pixels=pixels,
        frame_rule=frame_rule,
        block_clips=block_clips,
    )
    create_cache(path, spec, clips.clips, origin={}, created_with={"evl-cache": "test"})
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, tower.width, generator=torch.Generator().manual_seed(99))
    if names is not None:
        directions = directions[[sorted(names).index(name) for name in names]]
    locks = LockWatcher(path / LOCKS_NAME, expiry_s=60.0)
    with ThreadPoolExecutor(1) as encoders:
        for block in range(spec.num_blocks):
            lock = locks.take(block)
            assert lock is not None
            writer = BlockWriter(path, spec, block, lock=lock, encoders=encoders)
            try:
                records = []
                for row in spec.clips_of_block(block):
                    error = "broken" if row in failed else None
                    records.append(ClipRecord(id=clips.clips[row].id, error=error))
                    for _ in range(views.per_clip):
                        features = _features(spec, directions[labels[row]], generator)
                        writer.append(None if error else make_row(*features, spec))
                writer.commit(records, {})
            finally:
                writer.close()
                lock.release()
    write_manifest(path, spec)
    return FeatureCache(path)


def write_pair(folder: Path, *, val_prefix: str = "v", **options: Any) -> tuple[FeatureCache, FeatureCache]:
    """A train cache of 13 clips and a validation cache of five, of the same classes. options: as `write_cache`."""
    return (
        write_cache(folder / "train", **options),
        write_cache(
            folder / "val", labels=(0, 1, 2, 2, 1), prefix=val_prefix, split="val", seed=1, **options
        ),
    )


def _features(
    spec: CacheSpec, direction: torch.Tensor, generator: torch.Generator
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    T, N, P, C = spec.views.frames, spec.num_tokens, spec.num_tokens - 1, spec.tower.width
    tokens = [torch.randn(T, N, C, generator=generator) + 0.7 * direction for _ in spec.layers]
    if not spec.has_maps:
        return tokens, None
    return tokens, [
        torch.softmax(torch.randn(2, T - 1, P, P, generator=generator), dim=-1) for _ in spec.layers
    ]
