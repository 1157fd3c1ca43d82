"""How large the generated caches of `benchmarks.scale` are: their clips, their tower and their specs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evl_cache.clips import Clip, ClipList
from evl_cache.extract.stage import SHARD_SAMPLES
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.towers import Tower, build_tower

NUM_CLASSES = 400
_TOWER = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 16,
        "width": 64,
        "layers": 12,
        "head_width": 32,
        "mlp_ratio": 2.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a cache is.

    Attributes:
        clips: of its list.
        views: samples of each clip.
        changes: to the spec, by field.
        split: `train` or `val`: clips of the two have different names.
    """

    clips: int
    views: int
    changes: Mapping[str, Any]
    split: str = "train"


SIZES = {
    "k400x1": Size(clips=240_000, views=1, changes={}),
    "k400x10": Size(clips=240_000, views=10, changes={}),
    # Ten million samples: one layer and no maps, so that its marks take one gigabyte and not six.
    "10m": Size(clips=1_000_000, views=10, changes={"layers": (12,), "tokens": "fp16", "maps": "none"}),
    "k2000": Size(clips=12_000, views=10, changes={}),  # to try things on
}


@lru_cache(maxsize=1)
def tower() -> Tower:
    """A tower of ViT-B/16's layers, four patches a frame and 64 channels; random weights from a fixed seed."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "generated.json").write_text(json.dumps(_TOWER))
        return build_tower(str(Path(folder) / "generated.json"), "none")


def clip_list(size: Size) -> ClipList:
    """Clips that have no files, with ids as long as those of Kinetics."""
    names = tuple(f"class number {i}" for i in range(NUM_CLASSES))
    clips = tuple(
        Clip(id=clip_id, path=f"{clip_id}.mp4", label=row % NUM_CLASSES, split=size.split)
        for row, clip_id in enumerate(_ids(size))
    )
    return ClipList(clips=clips, classes=names, source="generated", is_undivided=True)


def _ids(size: Size) -> Iterator[str]:
    for row in range(size.clips):
        video = f"{row * 2654435761 % 2**40:011x}"
        start = row % 290
        yield f"{size.split}/class_number_{row % NUM_CLASSES}/{video}_{start:06d}_{start + 10:06d}"


def cache_spec(size: Size, clips: ClipList) -> CacheSpec:
    """The spec of a cache of this size: 8 frames, five layers, int8 tokens and uint8 maps, unless it says otherwise."""
    spec = CacheSpec(
        dataset="generated",
        split=size.split,
        classes=clips.classes,
        tower=tower().spec,
        views=ViewSpec(train_views=size.views) if size.views > 1 else ViewSpec(),
        layers=(8, 9, 10, 11, 12),
        tokens="int8",
        maps="uint8",
        compute_dtype="float32",
        num_clips=size.clips,
        content_id=clips.content_id,
        block_clips=max(1, SHARD_SAMPLES // size.views),
    )
    return replace(spec, **size.changes)
