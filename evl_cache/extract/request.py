"""A data set by name, extracted into one cache a split: what `evl-cache extract` does."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from evl_cache.caches.places import cache_root
from evl_cache.clips import TRAIN_SPLITS
from evl_cache.datasets import DATASETS, DatasetReader, check_missing
from evl_cache.errors import UsageError
from evl_cache.extract.job import ExtractionJob, ExtractOptions, OnBottleneck, OnClip
from evl_cache.extract.stage import ExtractResult, extract, make_spec
from evl_cache.processes import Rendezvous
from evl_cache.spec import SOFTWARE_PIXELS, CacheSpec, ViewSpec
from evl_cache.towers import build_tower, default_pretrained

DATA_ROOT_VARIABLE = "EVL_DATA_ROOT"
DEFAULT_LAYERS = 4

Progress = Callable[[CacheSpec], AbstractContextManager[tuple[OnClip, OnBottleneck]]]


@dataclass(frozen=True, kw_only=True)
class ExtractRequest:
    """What a user asks of `extract`; None is "the default that works".

    Attributes:
        dataset: name; root, annotations, list_path: where it lies. split: both train and val by default.
        model, pretrained: the tower. layers: blocks; the last four by default.
        views, tokens, maps, codec, compute_dtype: what is stored; see `spec`.
        train_split_views: views of the train split, where they are others.
        cache: the directory to write; named after its content under the cache root by default.
        limit: only the first clips of the list. allow_missing_percent: of files that are not there.
        pixels: of the decoder that will be used; see `DecodeOptions`.
    """

    dataset: str
    root: Path | None = None
    split: str | None = None
    annotations: Path | None = None
    list_path: Path | None = None
    model: str = "ViT-B-16-quickgelu"
    pretrained: str | None = None
    layers: tuple[int, ...] | None = None
    views: ViewSpec = field(default_factory=ViewSpec)
    train_split_views: ViewSpec | None = None
    tokens: str = "int8"
    maps: str = "uint8"
    codec: str = "default"
    compute_dtype: str | None = None
    cache: Path | None = None
    limit: int | None = None
    allow_missing_percent: float = 0.0
    pixels: str = SOFTWARE_PIXELS

    @property
    def weights(self) -> str:
        """`pretrained`, or the model's own."""
        return self.pretrained or default_pretrained(self.model)

    def origin(self, root: Path) -> dict[str, Any]:
        """What `repair` and `predict` need beside the spec; files by their whole path."""
        names = {"model": self.model, "pretrained": self.weights}
        paths = {name: str(Path(value).resolve()) for name, value in names.items() if Path(value).is_file()}
        return {"root": str(root.resolve()), **names, **paths}


def plan_extraction(request: ExtractRequest, *, device: str) -> list[ExtractionJob]:
    """A job for each cache of a request; nothing is written.

    Raises: UsageError, WeightsError for anything in the request that cannot be.
    """
    reader = dataset_reader(request.dataset)
    root = dataset_root(request)
    lists = reader.read(
        root, annotations=request.annotations, split=request.split, list_path=request.list_path
    )
    if request.cache is not None and len(lists) > 1:
        raise UsageError(
            f"--cache {request.cache} for {len(lists)} splits ({', '.join(lists)}); name one with --split"
        )
    augmented = request.train_split_views is not None and request.train_split_views.train_views > 0
    if augmented and not any(split in TRAIN_SPLITS for split in lists):
        raise UsageError(
            f"augmented training views, but no train split in {', '.join(lists)}; name it with --split train"
        )
    tower = build_tower(request.model, request.weights)
    last = tower.spec.blocks
    layers = request.layers or tuple(range(max(1, last - DEFAULT_LAYERS + 1), last + 1))
    jobs = []
    for split, clips in lists.items():
        if request.limit is not None:
            clips = replace(clips, clips=clips.clips[: request.limit])
        check_missing(clips, root, allow_percent=request.allow_missing_percent)
        spec = make_spec(
            clips,
            dataset=request.dataset,
            split=split,
            tower=tower.spec,
            layers=layers,
            views=(request.train_split_views or request.views) if split in TRAIN_SPLITS else request.views,
            tokens=request.tokens,
            maps=request.maps,
            codec=request.codec,
            pixels=request.pixels,
            compute_dtype=request.compute_dtype
            or ("float32" if torch.device(device).type == "cpu" else "float16"),
        )
        jobs.append(
            ExtractionJob(
                clips=clips,
                root=root,
                cache_path=request.cache or cache_root() / spec.name,
                spec=spec,
                tower=tower,
                origin=request.origin(root),
            )
        )
    return jobs


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
    on_job: Callable[[ExtractionJob], None] = lambda job: None,
    rendezvous: Rendezvous | None = None,
) -> Iterator[tuple[ExtractionJob, ExtractResult]]:
    """Extract every split of a request, one after another.

    Args:
        progress: opens the progress line of a cache, which is told of clips and of the bottleneck.
        on_job: called before each cache is begun.
        rendezvous: shared by the processes of one run.
    """
    for job in plan_extraction(request, device=options.device):
        on_job(job)
        with progress(job.spec) as (on_clip, on_bottleneck):
            result = extract(
                job, options=options, on_clip=on_clip, on_bottleneck=on_bottleneck, rendezvous=rendezvous
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
    return Path(base) / request.dataset
