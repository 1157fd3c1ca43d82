"""A tower: the frozen module together with its spec."""

from dataclasses import dataclass

from torch import nn

from evl_cache.spec import TowerSpec


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A frozen tower.

    Attributes:
        visual: the module.
        spec: what it is, as caches record it.
    """

    visual: nn.Module
    spec: TowerSpec
