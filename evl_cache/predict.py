"""Raw videos to labels: the run's own backbone, sampling and views, and its head.

V videos, K classes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evl_cache.annotations.folder import is_video
from evl_cache.backbone import Backbone
from evl_cache.checkpoint import TOWER_NAME, RunConfig, load_head, read_run_config
from evl_cache.clips import Clip, ClipList
from evl_cache.distributed import Processes
from evl_cache.errors import EvlCacheError, UsageError, WeightsError
from evl_cache.online_loader import LiveClips, OnlineLoader
from evl_cache.scoring import score
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.towers import build_tower


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a head says of videos.

    Attributes:
        classes: names by label.
        videos: that were scored. probabilities: float64 (V, K), softmax averaged over views.
        failures: (video, reason) of those that were not.
    """

    classes: tuple[str, ...]
    videos: tuple[Path, ...]
    probabilities: np.ndarray
    failures: tuple[tuple[Path, str], ...]

    def top(self, k: int) -> list[list[tuple[str, float]]]:
        """The k most probable (class, probability) of each video; ties go to the lower class number."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, : min(k, len(self.classes))]
        return [
            [(self.classes[label], float(row[label])) for label in labels]
            for labels, row in zip(order.tolist(), self.probabilities, strict=True)
        ]


def predict(
    run: Path,
    videos: Sequence[Path],
    *,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "cpu",
    batch: int = 8,
    workers: int = 2,
    best: bool = False,
) -> Predictions:
    """Label videos with a run's head, with the views that the run was validated with.

    Args:
        run: directory that `train` wrote. videos: files and folders, which are searched.
        model, pretrained: where the run's tower is now; it must be the same one. As the run names it by default.
        batch: samples of a pass. workers: threads that decode. best: the head of the best epoch.

    Raises: UsageError where there is no such run or no video, WeightsError where the tower is another one.
    """
    files = find_videos(videos)
    config = read_run_config(run)
    spec = _live_spec(config, run, num_clips=len(files))
    head = load_head(run, best=best).to(device)
    backbone = _backbone(
        config, run, spec, model, pretrained, with_maps=head.reads_maps, device=torch.device(device)
    )
    clips = ClipList(
        clips=tuple(Clip(id=str(file), path=str(file), label=0, split="predict") for file in files),
        classes=spec.classes,
        source="predict",
    )
    source = LiveClips.of(clips, Path(), spec)
    loader = OnlineLoader(
        source,
        np.arange(spec.num_samples, dtype=np.int64),
        backbone=backbone,
        device=torch.device(device),
        batch=batch,
        shuffle_seed=None,
        workers=workers,
        processes=Processes(),
    )
    try:
        scores = score(head, loader, device=torch.device(device))
        scored, probabilities = scores.clips.tolist(), scores.probabilities
    except EvlCacheError:
        if len(loader.failures) < len(files):
            raise
        scored, probabilities = [], np.empty((0, len(spec.classes)))
    return Predictions(
        classes=config.classes,
        videos=tuple(files[row] for row in scored),
        probabilities=probabilities,
        failures=tuple((files[row], reason) for row, reason in sorted(loader.failures.items())),
    )


def find_videos(given: Sequence[Path]) -> list[Path]:
    """Files as they are given, and the videos in folders and below, by name; each once.

    Raises: UsageError for what is not there, and for a folder that holds no video.
    """
    found: dict[Path, None] = {}
    for path in given:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        inside = list(_videos_below(path)) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"{path}: no video in it; expected files such as .mp4, .webm or .avi")
        found |= dict.fromkeys(inside)
    return list(found)


def _videos_below(folder: Path) -> Iterator[Path]:
    for directory, folders, names in os.walk(folder):
        folders.sort()
        yield from (path for name in sorted(names) if is_video(path := Path(directory) / name))


def _live_spec(config: RunConfig, run: Path, *, num_clips: int) -> CacheSpec:
    """The training features, of other clips, with the views of validation."""
    if config.features is None:
        raise UsageError(
            f"{run}: its head was imported, so it has no tower and no views of its own; extract a cache and use eval"
        )
    spec = CacheSpec.from_json(config.features)
    views = spec.views if config.tower is None else ViewSpec(**config.tower["views"])
    return replace(spec, views=views, num_clips=num_clips, layers=config.layers or spec.layers, block_clips=1)


def _backbone(
    config: RunConfig,
    run: Path,
    spec: CacheSpec,
    model: str | None,
    pretrained: str | None,
    *,
    with_maps: bool,
    device: torch.device,
) -> Backbone:
    names: Mapping[str, str] = config.tower or {}
    kept = run / TOWER_NAME
    model = model or (str(kept) if kept.exists() else names.get("model"))
    pretrained = pretrained or names.get("pretrained")
    if model is None or pretrained is None:
        raise UsageError(
            f"{run}: it does not say where its tower {spec.tower.model} is; give --model and --pretrained"
        )
    visual, found = build_tower(model, pretrained)
    if found.weights_sha256 != spec.tower.weights_sha256:
        raise WeightsError(
            f"{model} ({pretrained}) has weights {found.weights_sha256[:12]}, the run was trained on features of "
            f"{spec.tower.model} ({spec.tower.pretrained}) with {spec.tower.weights_sha256[:12]}; give --model and "
            "--pretrained of that one"
        )
    # A CPU makes float16 slowly, and float32 is what the head takes.
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, spec.compute_dtype)
    return Backbone(visual.to(device=device, dtype=dtype), spec.layers, with_maps=with_maps)
