"""Finding caches by what they hold, where a command does not name one."""

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evl_cache.batches import Source
from evl_cache.clips import select
from evl_cache.errors import CacheDamaged, CacheError, NoCacheHere, UsageError
from evl_cache.heads import has_module, head_depth
from evl_cache.heads import head_layers as resolve_layers
from evl_cache.notation import format_layers
from evl_cache.spec import CacheSpec
from evl_cache.store import (
    SCHEMES,
    FeatureCache,
    is_url,
    open_objects,
    public_url,
    read_clips_from,
    read_description_from,
)
from evl_cache.train_options import TrainOptions

CACHE_ROOT_VARIABLE = "EVL_CACHE_ROOT"
TRAIN_SPLITS = ("train",)
VAL_SPLITS = ("val", "validation", "test")
_DEFAULT_BLOCKS = 12  # of extract's default model
_LAYERS_OF_ALL = 4  # to extract for a head that reads all there are


@dataclass(frozen=True, kw_only=True)
class FoundCache:
    """A cache's place (path or URL, which may hold credentials: show `name`) and spec; `recipe` as its description has it."""

    place: str
    spec: CacheSpec
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last part of the place."""
        return self.place.rstrip("/").rpartition("/")[2]


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
            depth = head_depth(needs.head) or _LAYERS_OF_ALL
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


def cache_places() -> tuple[str, ...]:
    """The places that `$EVL_CACHE_ROOT` names, as PATH does: directories and URLs; `./caches` by default."""
    return split_places(os.environ.get(CACHE_ROOT_VARIABLE) or "caches")


def split_places(text: str) -> tuple[str, ...]:
    """Places between colons; those inside URLs (scheme, password, port) do not part them."""
    places: list[str] = []
    for piece in text.split(os.pathsep):
        before = places[-1] if places else ""
        if (piece.startswith("//") and before in SCHEMES) or _is_rest_of_host(before, piece):
            places[-1] = f"{before}{os.pathsep}{piece}"
        elif piece:
            places.append(piece)
    return tuple(places)


def _is_rest_of_host(before: str, piece: str) -> bool:
    """Whether `piece` is a password with its host, or a port: the URL before it has no path yet."""
    scheme, _, rest = before.partition("://")
    if scheme not in SCHEMES or not rest or "/" in rest:
        return False
    host = piece.partition("/")[0]
    return host.isdecimal() or ("@" in host and "@" not in rest)


def cache_root() -> Path:
    """The directory that new caches go to: the first of the places. Raises: UsageError where all are URLs."""
    for place in cache_places():
        if not is_url(place):
            return Path(place)
    raise UsageError(
        f"{CACHE_ROOT_VARIABLE} names URLs only; extract writes to a directory: name one too, or use --cache"
    )


def find_caches(place: str | Path) -> Iterator[FoundCache]:
    """Caches directly under a place, by name, or the place itself. What is no cache, or damaged, is passed over.

    Raises: CacheError where a URL cannot be read.
    """
    with contextlib.suppress(NoCacheHere, CacheDamaged):
        yield _look_at(str(place))
        return
    for name in open_objects(place).folders():
        with contextlib.suppress(NoCacheHere, CacheError):
            yield _look_at(f"{str(place).rstrip('/')}/{name}")


def _look_at(place: str) -> FoundCache:
    found = read_description_from(open_objects(place))
    return FoundCache(place=place, spec=found.spec, recipe=found.recipe)


def find_pair(
    dataset: str | None, *, places: Sequence[str | Path], needs: HeadNeeds
) -> tuple[FoundCache, FoundCache]:
    """The one training cache (of a data set, where named) that fits, and its validation cache.

    Raises: UsageError where none fits, saying what is missing and how to make it, or several do (they are listed).
    """
    found = [c for place in places for c in find_caches(place) if dataset in (None, c.spec.dataset)]
    wanted = "caches" if dataset is None else f"caches of {dataset}"
    under = ", ".join(public_url(str(p)) if is_url(p) else str(p) for p in places)
    if not found:
        layers = f" --layers {needs.layers(_DEFAULT_BLOCKS)}"
        raise UsageError(
            f"no {wanted} under {under}; run evl-cache extract --dataset {dataset or 'NAME'}{layers}, "
            f"or set {CACHE_ROOT_VARIABLE}"
        )
    pairs = [
        (t, v)
        for t in found
        if t.spec.split in TRAIN_SPLITS and needs.objection(t.spec) is None
        for v in found
        if v.spec.split in VAL_SPLITS and _belong_together(t.spec, v.spec)
    ]
    if len(pairs) > 1:  # folds of one data set: what one trains on, another validates on
        pairs = [(t, v) for t, v in pairs if _clip_ids(t).isdisjoint(_clip_ids(v))]
    if len(pairs) == 1:
        return pairs[0]
    listed = "; ".join(
        f"{c.name} ({c.spec.dataset} {c.spec.split}, {c.spec.tower.model}, layers {list(c.spec.layers)})"
        for c in found
    )
    if not pairs:
        raise UsageError(
            f"no pair of train and validation {wanted} under {under} fits the head; there are: {listed}; "
            f"{_missing(found, needs)}"
        )
    raise UsageError(f"several {wanted} under {under} fit; name one with --cache and --val-cache: {listed}")


def _missing(found: Sequence[FoundCache], needs: HeadNeeds) -> str:
    """Of the caches that come nearest: what they lack, and the command that makes it."""
    train = [c for c in found if c.spec.split in TRAIN_SPLITS]
    fitting = [c for c in train if needs.objection(c.spec) is None]
    if fitting:
        cache = fitting[0]
        command = extract_command(cache, split="val", layers=format_layers(cache.spec.layers))
        return f"{cache.name} fits, but its validation cache is missing; run {command}"
    if train:
        cache = train[-1]
        layers = needs.layers(cache.spec.tower.blocks)
        maps = "uint8" if needs.some_maps and cache.spec.maps == "none" else cache.spec.maps
        command = extract_command(cache, split=None, layers=layers, maps=maps)
        return f"{cache.name}: {needs.objection(cache.spec)}; run {command}"
    cache = found[0]
    command = extract_command(cache, split="train", layers=format_layers(cache.spec.layers))
    return f"the training cache is missing; run {command}"


def extract_command(cache: FoundCache, *, split: str | None, layers: str, maps: str | None = None) -> str:
    """The extract command that makes a cache like another one, of another split, other layers or maps."""
    spec, views = cache.spec, cache.spec.views
    words = ["evl-cache extract --dataset", spec.dataset]
    if root := cache.recipe.get("root"):
        words += ["--root", shlex.quote(str(root))]
    words += ["--split", split] if split else []
    words += ["--model", shlex.quote(str(cache.recipe.get("model") or spec.tower.model))]
    words += ["--pretrained", shlex.quote(str(cache.recipe.get("pretrained") or spec.tower.pretrained))]
    words += ["--layers", layers, "--frames", str(views.frames)]
    words += ["--sampling tsn"] if views.stride is None else ["--stride", str(views.stride)]
    if views.train_views and split in (None, *TRAIN_SPLITS):
        words += ["--train-views", str(views.train_views)]
    elif not views.train_views and views.per_clip > 1:
        words += ["--views", f"{views.temporal_views}x{views.spatial_views}"]
    words += [] if spec.tokens == "int8" else ["--tokens", spec.tokens]
    words += [] if (maps or spec.maps) == "uint8" else ["--maps", maps or spec.maps]
    return " ".join(words)


def _clip_ids(found: FoundCache) -> frozenset[str]:
    objects = open_objects(found.place)
    return frozenset(clip.id for clip in read_clips_from(objects, read_description_from(objects)))


def _belong_together(train: CacheSpec, val: CacheSpec) -> bool:
    return (
        train.dataset == val.dataset
        and train.tower.weights_sha256 == val.tower.weights_sha256
        and train.layers == val.layers
        and (train.views.frames, train.views.sampling, train.views.stride)
        == (val.views.frames, val.views.sampling, val.views.stride)
        and (train.tokens, train.maps, train.classes) == (val.tokens, val.maps, val.classes)
    )


def find_training_caches(
    dataset: str | None,
    cache: Path | str | None,
    val_cache: Path | str | None,
    *,
    needs: HeadNeeds,
    same_cache_for_val: bool,
    trust: bool = False,
    on_found: Callable[[FeatureCache, FeatureCache], None] = lambda train, val: None,
) -> tuple[FeatureCache, FeatureCache]:
    """The training and the validation cache: those named, or the pair there is that fits.

    Args:
        needs: of the heads to train.
        same_cache_for_val: clips for validation are named: they may be of the training cache.
        trust: do not check chunks against their marks.
        on_found: told the pair, where none was named.

    Raises: UsageError where the arguments do not tell, nothing fits, or several do.
    """
    if dataset is not None and cache is not None:
        raise UsageError("--dataset (caches are found) and --cache; expected one of them at most")
    if cache is not None:
        if val_cache is None and not same_cache_for_val:
            raise UsageError(
                f"--cache {cache} without --val-cache; give one, or --val-clips of the same cache"
            )
        train = FeatureCache(cache, trust=trust)
        return train, train if val_cache is None else FeatureCache(val_cache, trust=trust)

    pair = find_pair(dataset, places=cache_places(), needs=needs)
    opened = FeatureCache(pair[0].place, trust=trust), FeatureCache(val_cache or pair[1].place, trust=trust)
    on_found(*opened)
    return opened


def split_clips(
    train: Source,
    val: Source,
    *,
    train_names: Sequence[str] | None,
    val_names: Sequence[str] | None,
) -> tuple[list[int] | None, list[int] | None]:
    """Rows of the clips to train and to validate on; None is all of them.

    Where both caches hold the same clips (one cache twice, or other views of it), what one side names is left
    out of the other.

    Raises: UsageError for a name that is no clip's, or one that is on both sides.
    """
    train_rows = None if train_names is None else select(train.clips, train_names, source="--train-clips")
    val_rows = None if val_names is None else select(val.clips, val_names, source="--val-clips")
    if train.spec.content_id != val.spec.content_id:
        return train_rows, val_rows
    rows = range(len(train.clips))
    if train_rows is None and val_rows is not None:
        train_rows = sorted(set(rows) - set(val_rows))
    elif val_rows is None and train_rows is not None:
        val_rows = sorted(set(rows) - set(train_rows))
    elif train_rows is not None and val_rows is not None:
        both = [train.clips[row].id for row in sorted(set(train_rows) & set(val_rows))]
        if both:
            raise UsageError(
                f"{both[0]!r} and {len(both) - 1} more are in --train-clips and in --val-clips; keep them apart"
            )
    return train_rows, val_rows


def next_run_directory(cache_name: str, head: str) -> Path:
    """A run directory that does not exist yet: `runs/<cache>-<head>-<number>`."""
    number = 1
    while (path := Path("runs") / f"{cache_name}-{head}-{number}").exists():
        number += 1
    return path
