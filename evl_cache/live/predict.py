"""Raw videos to labels: the run's own backbone, sampling and views, and its head.

V videos, K classes.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evl_cache.batches import samples_of_clips
from evl_cache.clips import Clip
from evl_cache.datasets import is_passed_over, is_video
from evl_cache.errors import EvlCacheError, Outage, UsageError
from evl_cache.extract import OnOutage, decoding_for, default_workers_on
from evl_cache.live.clips import LiveClips
from evl_cache.live.loader import OnlineLoader
from evl_cache.live.run_tower import live_spec, run_backbone
from evl_cache.precision import check_precision, device_named, precision_of_run
from evl_cache.processes import Processes
from evl_cache.runs import load_head, read_run_config, score
from evl_cache.video import DecodeOptions
from evl_cache.video.pool import DEFAULT_TIMEOUT_S, DecodePool

PATIENCE_S = 60.0  # with an outage: a person waits


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a head says of videos.

    Attributes:
        classes: names by label.
        videos: those that were scored.
        probabilities: float64 (V, K), softmax averaged over views.
        failures: (video, reason) of those that were not scored.
        precision: that the head was computed in.
    """

    classes: tuple[str, ...]
    videos: tuple[Path, ...]
    probabilities: np.ndarray
    failures: tuple[tuple[Path, str], ...]
    precision: str

    def top(self, k: int) -> list[list[tuple[str, float]]]:
        """The k most probable (class, probability) of each video; ties go to the lower class number."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, : min(k, len(self.classes))]
        return [
            [(self.classes[label], float(row[label])) for label in labels]
            for labels, row in zip(order.tolist(), self.probabilities, strict=True)
        ]


def predict(
    run: str | Path,
    videos: Sequence[str | Path],
    *,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "cpu",
    precision: str | None = None,
    batch: int = 8,
    workers: int | None = None,
    decoding: DecodeOptions | None = None,
    clip_timeout_s: float = DEFAULT_TIMEOUT_S,
    best: bool = False,
    patience_s: float = PATIENCE_S,
    on_outage: OnOutage = lambda message: None,
) -> Predictions:
    """Label videos with a run's head, with the views that the run was validated with.

    Args:
        run: directory that `train` wrote.
        videos: files, and folders, which are searched.
        model: where the run's tower is now; it must be the same one. As the run names it by default.
        pretrained: where its weights are now; as the run names them by default.
        device: where the tower and the head run.
        precision: to compute the head in; that of the run's training by default, where the device has it.
        batch: samples of a pass.
        workers: processes that decode; by default as `extract` has it.
        decoding: how; by default with a decoder that gives the pixels that the run was trained on.
        clip_timeout_s: longest time for decoding one video.
        best: use the head of the best epoch.
        patience_s: how long a disk that is away, say, is waited for.
        on_outage: called with a line when one is away, and with one when it is back.

    Raises: UsageError where there is no such run or no video, for a decoder of other pixels than the run's, or for a
        precision that the device cannot compute in;
        WeightsError where the tower is another one; Outage where videos cannot be read, and are not to blame.
    """
    files, run, device = find_videos(videos), Path(run), device_named(device)
    config = read_run_config(run)
    precision = precision or precision_of_run(config.training, device)
    check_precision(precision, device)
    spec = live_spec(config, run, num_clips=len(files))
    decoding = decoding_for(spec.pixels, decoding or DecodeOptions(), device=device)
    workers = workers or default_workers_on(device, spec, decoding).decoding
    head = load_head(run, best=best).to(device)
    backbone = run_backbone(
        config, run, spec, model, pretrained, with_maps=head.reads_maps, device=torch.device(device)
    )
    clips = tuple(Clip(id=str(file), path=str(file), label=0, split="predict") for file in files)
    source = LiveClips(path=Path(), spec=spec, clips=clips)
    with (
        DecodePool(workers, options=decoding, timeout_s=clip_timeout_s) as pool,
        OnlineLoader(
            source,
            samples_of_clips(source, None),
            backbone=backbone,
            device=torch.device(device),
            batch=batch,
            shuffle_seed=None,
            decode=pool.frames,
            workers=workers,
            processes=Processes(),
            patience_s=patience_s,
            on_outage=on_outage,
        ) as loader,
    ):
        try:
            scores = score(head, loader, device=torch.device(device), precision=precision)
            scored, probabilities = scores.clips.tolist(), scores.probabilities
        except Outage:
            raise
        except EvlCacheError:
            if len(loader.failures) < len(files):
                raise
            scored, probabilities = [], np.empty((0, len(spec.classes)))
    return Predictions(
        classes=config.classes,
        videos=tuple(files[row] for row in scored),
        probabilities=probabilities,
        failures=tuple((files[row], reason) for row, reason in sorted(loader.failures.items())),
        precision=precision,
    )


def find_videos(given: Sequence[str | Path]) -> list[Path]:
    """Files as they are given, and the videos in folders and below, by name; each once.

    Raises: UsageError for what is not there, and for a folder that holds no video.
    """
    found: dict[Path, None] = {}
    for path in map(Path, given):
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        inside = list(filter(is_video, _files_below(path))) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"{path}: no video in it; expected files such as .mp4, .webm or .avi")
        found |= dict.fromkeys(inside)
    return list(found)


def count_passed_over(given: Sequence[str | Path]) -> Mapping[str, int]:
    """Return by endings how many files in the folders given `find_videos` passes over: any file is taken if it is named."""
    below = (file for path in map(Path, given) if path.is_dir() for file in _files_below(path))
    return Counter(file.suffix.lower() for file in below if is_passed_over(file))


def links_passed_over(given: Sequence[str | Path]) -> list[Path]:
    """Return the links to folders in the folders given: they may lead back, and `find_videos` does not follow them."""
    walks = (os.walk(path) for path in map(Path, given) if path.is_dir())
    below = (Path(directory) / name for walk in walks for directory, folders, _ in walk for name in folders)
    return sorted(path for path in below if path.is_symlink())


def _files_below(folder: Path) -> Iterator[Path]:
    for directory, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(directory) / name for name in sorted(names))
