"""A tower: the frozen module together with its spec."""

from typing import NamedTuple

from torch import nn

from evl_cache.spec import TowerSpec


class Tower(NamedTuple):
    """A frozen tower, which `visual, spec = build_tower(...)` takes apart.

    Attributes:
        visual: the module.
        spec: what it is, as caches record it.
    """

    visual: nn.Module
    spec: TowerSpec
