"""What the heads of some trainings ask of a cache, before one is chosen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evl_cache.errors import UsageError
from evl_cache.extract_options import DEFAULT_LAYERS
from evl_cache.heads import has_module, head_depth, head_layers
from evl_cache.notation import format_layers
from evl_cache.spec import CacheSpec
from evl_cache.train.head_reads import training_reads
from evl_cache.train.options import TrainOptions


@dataclass(frozen=True)
class HeadNeeds:
    """What the heads of some trainings ask of the cache that they share.

    Attributes:
        trainings: options of each.
    """

    trainings: tuple[TrainOptions, ...]

    @property
    def some_maps(self) -> bool:
        """Whether one of the heads reads maps, where a view has several frames."""
        module = "temporal_cross_attention"
        return any(getattr(t, module) and has_module(t.head, module) for t in self.trainings)

    def objection(self, spec: CacheSpec) -> str | None:
        """Why a cache does not fit, or None."""
        if lacking := self.lacking(spec.layers):
            return lacking
        try:
            if not spec.has_maps and any(training_reads(t, spec).with_maps for t in self.trainings):
                return "it holds no attention maps"
        except UsageError as error:  # no head can be built for such features
            return str(error).partition(";")[0]
        return None

    def lacking(self, layers: Sequence[int]) -> str | None:
        """Why these layers are not what the heads read, or None."""
        try:
            for t in self.trainings:
                head_layers(t.head, tuple(layers), t.head_layers)
        except UsageError as error:
            return str(error).partition(";")[0]
        return None

    def layers(self, depth: int) -> str:
        """The layers to extract from a tower that has `depth` of them, as `--layers` takes them."""
        wanted: set[int] = set()
        for t in self.trainings:
            count = head_depth(t.head) or DEFAULT_LAYERS  # for a head that reads all there are
            wanted.update(t.head_layers or range(max(1, depth - count + 1), depth + 1))
        return format_layers(tuple(sorted(wanted)))


def needs_of(trainings: Iterable[TrainOptions]) -> HeadNeeds:
    """What the heads of some trainings ask of the cache that they share."""
    return HeadNeeds(tuple(trainings))
