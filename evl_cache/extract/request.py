"""A data set by name, extracted into one cache a split: what `evl-cache extract` does."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evl_cache.caches.places import cache_root
from evl_cache.clips import TRAIN_SPLITS, Clip, ClipList, fold_of
from evl_cache.datasets import DATASETS, DatasetReader, check_allowance, check_missing, missing_clips
from evl_cache.errors import CacheError, UsageError
from evl_cache.extract.grown import Progress, extract_grown
from evl_cache.extract.growth import Growth, plan_growth
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.older_rule import job_to_redo, spec_there
from evl_cache.extract.outages import OnOutage
from evl_cache.extract.recipes import ViewChoice
from evl_cache.extract.stage import ExtractResult, extract, make_spec
from evl_cache.extract_options import DEFAULT_LAYERS, DEFAULT_MODEL, Role, options_with
from evl_cache.processes import Rendezvous
from evl_cache.spec import CODECS, MAP_STORAGE, SOFTWARE_PIXELS, TOKEN_STORAGE, CacheSpec, ViewSpec
from evl_cache.store import directory_of
from evl_cache.towers import build_tower, default_pretrained, is_model_file, is_weights_file

DATA_ROOT_VARIABLE = "EVL_DATA_ROOT"


@dataclass(frozen=True, kw_only=True)
class ExtractRequest(ViewChoice):
    """What a user asks of `extract`; None is "the default that works". Each option of the command fills a field.

    Attributes:
        dataset: name.
        root, annotations, list_path, classes_path: where the data set lies; a `str` becomes a Path, here and below.
        split: the only split to extract; both train and val by default.
        model, pretrained: the tower.
        layers: the tower's layers to keep, counted from 1; the last four by default.
        recipe, frames, sampling, stride, views, train_views, …: see `ViewChoice`.
        tokens, maps, codec, compute_dtype: what is stored; see `spec`.
        cache: the directory to write; named after its content under the cache root by default.
        limit: only the first clips of the list.
        allow_missing_percent: how many files may be missing.
        pixels: of the decoder that will be used; see `DecodeOptions`.
    """

    dataset: str
    root: Path | None = None
    split: str | None = None
    annotations: Path | None = None
    list_path: Path | None = None
    classes_path: Path | None = None
    model: str = DEFAULT_MODEL
    pretrained: str | None = None
    layers: tuple[int, ...] | None = None
    tokens: str = TOKEN_STORAGE[0]
    maps: str = MAP_STORAGE[0]
    codec: str = CODECS[0]
    compute_dtype: str | None = None
    cache: Path | None = None
    limit: int | None = None
    allow_missing_percent: float = 0.0
    pixels: str = SOFTWARE_PIXELS

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("root", "annotations", "list_path", "classes_path", "cache"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        if self.cache is not None:
            directory_of(self.cache)

    @property
    def weights(self) -> str:
        """`pretrained`, or the model's own."""
        return self.pretrained or default_pretrained(self.model)

    def origin(self, root: Path, *, is_undivided: bool = False) -> dict[str, Any]:
        """Return what the spec does not tell of a cache's making: `repair` and the command that is printed need it.

        Files stand by their whole path, links by their own names; options left at their default are left out, but for
        the tower.

        Args:
            root: folder of the videos.
            is_undivided: as `ClipList` has it.
        """
        told = {option.field: getattr(self, option.field) for option in options_with(Role.KEPT)}
        views, of_train = self.chosen_views()
        told |= {"root": root, "pretrained": self.weights, "views": None}
        if of_train is not None:  # each of the two caches tells of the other
            augmented = ("train_views", "augment_seed", "flip")
            told |= {"views": views.crops, **{name: getattr(of_train, name) for name in augmented}}
        if fold_of(self.split) == 1:  # the spec tells the split
            del told["split"]
        if is_model_file(self.model):
            told["model"] = Path(self.model)
        if is_weights_file(self.weights):
            told["pretrained"] = Path(self.weights)
        told |= {"is_undivided": is_undivided, "is_apart": not self._options_tell(views, of_train)}
        told["is_divided_list"] = self.dataset == "list" and not is_undivided
        kept = {n: str(v.absolute()) if isinstance(v, Path) else v for n, v in told.items() if v}
        return kept | {"is_whole": True}  # older versions kept the root and the tower only

    def _options_tell(self, views: ViewSpec, of_train: ViewSpec | None) -> bool:
        """Whether options of one command give these views; some that Python gives they do not."""
        if of_train in (None, views):
            return not views.train_views
        plain = replace(of_train, train_views=0, augment_seed=0, flip=False)
        same = replace(views, temporal_views=1, spatial_views=1, train_views=0, augment_seed=0, flip=False)
        return not views.train_views and plain == same and bool(of_train.train_views or self.recipe)

    def chosen_views(self) -> tuple[ViewSpec, ViewSpec | None]:
        """Return the views of validation, and those of the train split where they are others (None: the same).

        Raises: UsageError for an unknown data set, or views that contradict each other.
        """
        return self.resolve(dataset_reader(self.dataset).views)


@dataclass(frozen=True, kw_only=True)
class SplitsRead:
    """What a request names, as it was read from the disk before any tower is built.

    Attributes:
        root: folder of the videos.
        lists: clips by split.
        missing: clips without a file by split, in the order of the lists.
        views, of_train: as `ExtractRequest.chosen_views` returns them.
    """

    root: Path
    lists: Mapping[str, ClipList]
    missing: Mapping[str, list[Clip]]
    views: ViewSpec
    of_train: ViewSpec | None

    def views_of(self, split: str) -> ViewSpec:
        """Return the views of a split's clips."""
        return self.of_train if self.of_train is not None and split in TRAIN_SPLITS else self.views


OnRead = Callable[[SplitsRead], None]


def read_splits(request: ExtractRequest) -> SplitsRead:
    """Read the lists of clips. Raises: UsageError for what cannot be read, and choices that contradict each other."""
    reader = dataset_reader(request.dataset)
    views, of_train = request.chosen_views()
    check_allowance(request.allow_missing_percent)
    root = dataset_root(request)
    lists = reader.read(
        root,
        annotations=request.annotations,
        split=request.split,
        list_path=request.list_path,
        classes_path=request.classes_path,
    )
    if request.cache is not None and len(lists) > 1:
        raise UsageError(
            f"--cache {request.cache} for {len(lists)} splits ({', '.join(lists)}); name one with --split"
        )
    if of_train is not None and of_train.train_views and not any(split in TRAIN_SPLITS for split in lists):
        raise UsageError(
            f"augmented training views, but no train split in {', '.join(lists)}; name it with --split train"
        )
    if request.limit is not None:
        lists = {split: replace(clips, clips=clips.clips[: request.limit]) for split, clips in lists.items()}
    missing = {split: missing_clips(clips, root) for split, clips in lists.items()}
    return SplitsRead(root=root, lists=lists, missing=missing, views=views, of_train=of_train)


def plan_extraction(
    request: ExtractRequest, *, device: str, on_read: OnRead = lambda read: None
) -> list[ExtractionJob]:
    """A job for each cache of a request; nothing is written.

    Args:
        on_read: called before a tower is built, which may mean to fetch its weights, and after files were counted.

    Raises: UsageError, WeightsError for anything in the request that cannot be.
    """
    read = read_splits(request)
    root, lists = read.root, read.lists
    for split, clips in lists.items():
        check_missing(clips, root, allow_percent=request.allow_missing_percent, missing=read.missing[split])
    on_read(read)
    tower = build_tower(request.model, request.weights)
    last = tower.spec.blocks
    layers = request.layers or last_layers(last)
    jobs = []
    for split, clips in lists.items():
        spec = make_spec(
            clips,
            dataset=request.dataset,
            split=split,
            tower=tower.spec,
            layers=layers,
            views=read.views_of(split),
            tokens=request.tokens,
            maps=request.maps,
            codec=request.codec,
            pixels=request.pixels,
            compute_dtype=request.compute_dtype
            or ("float32" if torch.device(device).type == "cpu" else "float16"),
        )
        try:
            CacheSpec.from_json(spec.to_json())
        except CacheError as error:
            raise UsageError(f"no cache of this could be read again: {error}") from error
        cache_path = request.cache or cache_root() / spec.name
        jobs.append(
            ExtractionJob(
                clips=clips,
                root=root,
                cache_path=cache_path,
                spec=spec_there(spec, cache_path),
                tower=tower,
                origin=request.origin(root, is_undivided=clips.is_undivided),
                known_missing=frozenset(clip.id for clip in read.missing[split]),
            )
        )
    return jobs


def last_layers(blocks: int) -> tuple[int, ...]:
    """Return the layers that are kept of a tower where none are named."""
    return tuple(range(max(1, blocks - DEFAULT_LAYERS + 1), blocks + 1))


def dataset_reader(name: str) -> DatasetReader:
    """The reader of a data set. Raises: UsageError for an unknown one."""
    if name not in DATASETS:
        raise UsageError(f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


def extract_dataset(
    request: ExtractRequest,
    *,
    options: ExtractOptions,
    progress: Progress = lambda spec: nullcontext((lambda failed: None, lambda name: None)),
    on_read: OnRead = lambda read: None,
    on_job: Callable[[ExtractionJob], None] = lambda job: None,
    on_growth: Callable[[Growth], None] = lambda growth: None,
    on_outage: OnOutage = lambda message: None,
    rendezvous: Rendezvous | None = None,
) -> Iterator[tuple[ExtractionJob, ExtractResult]]:
    """Extract every split of a request, one after another.

    Args:
        progress: opens the progress line of a cache, which is told of clips and of the bottleneck.
        on_read: as `plan_extraction` takes it.
        on_job: called before each cache is begun.
        on_growth: called then where a cache that is there grows, or has grown.
        on_outage: as `extract` takes it.
        rendezvous: shared by the processes of one run.
    """
    for job in plan_extraction(request, device=options.device, on_read=on_read):
        if request.cache is None:
            job = job_to_redo(job, options)
        growth = plan_growth(job)
        if growth is not None:
            on_job(growth.job)
            on_growth(growth)
            yield (
                growth.job,
                extract_grown(
                    growth, options=options, progress=progress, on_outage=on_outage, rendezvous=rendezvous
                ),
            )
            continue
        on_job(job)
        with progress(job.spec) as (on_clip, on_bottleneck):
            result = extract(
                job,
                options=options,
                on_clip=on_clip,
                on_bottleneck=on_bottleneck,
                on_outage=on_outage,
                rendezvous=rendezvous,
            )
        yield job, result


def dataset_root(request: ExtractRequest) -> Path:
    """Where the videos lie: `--root`, the list's own folder, or `$EVL_DATA_ROOT/<dataset>`."""
    if request.root is not None:
        return request.root
    if request.list_path is not None:
        return request.list_path.parent
    base = os.environ.get(DATA_ROOT_VARIABLE)
    if not base:
        raise UsageError(
            f"where is {request.dataset}? give --root, or set {DATA_ROOT_VARIABLE} to the folder above it"
        )
    return Path(base).expanduser() / request.dataset
