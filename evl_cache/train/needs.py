"""What the heads of some trainings ask of a cache, before one is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evl_cache.errors import UsageError
from evl_cache.extract_options import DEFAULT_LAYERS
from evl_cache.heads import has_module, head_depth
from evl_cache.heads import head_layers as resolve_layers
from evl_cache.notation import format_layers
from evl_cache.spec import CacheSpec
from evl_cache.train.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class HeadNeeds:
    """What a head asks of a cache, and others that are trained from the same one.

    Attributes:
        head: name. head_layers: blocks it reads; the last ones by default. maps: whether it reads maps.
        others: of a sweep.
    """

    head: str
    head_layers: tuple[int, ...] | None = None
    maps: bool = True
    others: tuple["HeadNeeds", ...] = ()

    @property
    def some_maps(self) -> bool:
        """Whether one of the heads reads maps."""
        return self.maps or any(other.some_maps for other in self.others)

    def objection(self, spec: CacheSpec) -> str | None:
        """Why a cache does not fit, or None."""
        try:
            for needs in (self, *self.others):
                resolve_layers(needs.head, spec.layers, needs.head_layers)
        except UsageError as error:
            return str(error).partition(";")[0]
        if self.some_maps and not spec.has_maps and spec.views.frames > 1:
            return "it holds no attention maps"
        return None

    def layers(self, blocks: int) -> str:
        """The blocks to extract from a tower of `blocks`, as `--layers` takes them."""
        wanted: set[int] = set()
        for needs in (self, *self.others):
            depth = head_depth(needs.head) or DEFAULT_LAYERS  # for a head that reads all there are
            wanted.update(needs.head_layers or range(max(1, blocks - depth + 1), blocks + 1))
        return format_layers(tuple(sorted(wanted)))


def needs_of(trainings: Sequence[TrainOptions]) -> HeadNeeds:
    """What the heads of some trainings ask of a cache."""
    needs = [
        HeadNeeds(
            head=t.head,
            head_layers=t.head_layers,
            maps=t.temporal_cross_attention and has_module(t.head, "temporal_cross_attention"),
        )
        for t in trainings
    ]
    return replace(needs[0], others=tuple(needs[1:]))
