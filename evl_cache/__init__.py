"""evl-cache: frozen image backbones for video, features cached once, heads trained from the cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evl_cache.attention_maps import adjacent_frame_maps
    from evl_cache.heads import EVLHead
    from evl_cache.runs import load_head, load_official_checkpoint
    from evl_cache.store import FeatureCache
    from evl_cache.towers import Backbone, Features

__version__ = "0.1.0"

# Loaded on first use, so that the command line answers at once and stage two never meets stage one's libraries.
_HOMES = {
    "Backbone": "evl_cache.towers",
    "EVLHead": "evl_cache.heads",
    "FeatureCache": "evl_cache.store",
    "Features": "evl_cache.towers",
    "adjacent_frame_maps": "evl_cache.attention_maps",
    "load_head": "evl_cache.runs",
    "load_official_checkpoint": "evl_cache.runs",
}

__all__ = [
    "Backbone",
    "EVLHead",
    "FeatureCache",
    "Features",
    "__version__",
    "adjacent_frame_maps",
    "load_head",
    "load_official_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
