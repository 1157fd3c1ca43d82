"""Image towers: built by name, and read through one adapter a family."""

from evl_cache.towers.adapter import TowerAdapter, adapter_of
from evl_cache.towers.build import build_tower

__all__ = ["TowerAdapter", "adapter_of", "build_tower"]
