"""Frozen image towers: build one by name, and read its tokens, queries and keys through its family's adapter."""

from evl_cache.towers.backbone import Backbone, Features, check_layers, map_projections
from evl_cache.towers.build import build_tower, tower_shape
from evl_cache.towers.families import adapter_of
from evl_cache.towers.names import default_pretrained, is_model_file, is_weights_file
from evl_cache.towers.tower import Tower
from evl_cache.towers.weights import read_tower_weights

__all__ = [
    "Backbone",
    "Features",
    "Tower",
    "adapter_of",
    "build_tower",
    "check_layers",
    "default_pretrained",
    "is_model_file",
    "is_weights_file",
    "map_projections",
    "read_tower_weights",
    "tower_shape",
]
