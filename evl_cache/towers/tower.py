"""A tower: the frozen module together with its description."""

from dataclasses import dataclass

from torch import nn

from evl_cache.spec import TowerSpec


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A frozen tower with its description."""

    visual: nn.Module
    spec: TowerSpec
