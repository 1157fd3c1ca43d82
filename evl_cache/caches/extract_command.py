"""The extract command that makes a cache like another one."""

import shlex

from evl_cache.caches.places import FoundCache
from evl_cache.clips import TRAIN_SPLITS


def extract_command(cache: FoundCache, *, split: str | None, layers: str, maps: str | None = None) -> str:
    """The extract command that makes a cache like another one, of another split, other layers or maps."""
    spec, views = cache.spec, cache.spec.views
    words = ["evl-cache extract --dataset", spec.dataset]
    if root := cache.origin.get("root"):
        words += ["--root", shlex.quote(str(root))]
    words += ["--split", split] if split else []
    words += ["--model", shlex.quote(str(cache.origin.get("model") or spec.tower.model))]
    words += ["--pretrained", shlex.quote(str(cache.origin.get("pretrained") or spec.tower.pretrained))]
    words += ["--layers", layers, "--frames", str(views.frames)]
    words += ["--sampling tsn"] if views.stride is None else ["--stride", str(views.stride)]
    if views.train_views and split in (None, *TRAIN_SPLITS):
        words += ["--train-views", str(views.train_views)]
    elif not views.train_views and views.per_clip > 1:
        words += ["--views", f"{views.temporal_views}x{views.spatial_views}"]
    words += [] if spec.tokens == "int8" else ["--tokens", spec.tokens]
    words += [] if (maps or spec.maps) == "uint8" else ["--maps", maps or spec.maps]
    return " ".join(words)
