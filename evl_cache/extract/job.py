"""An extraction job, and the options of running it; both are handed down whole."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evl_cache.clips import ClipList
from evl_cache.errors import UsageError
from evl_cache.extract.failure_limit import FailureLimit
from evl_cache.extract_options import MOST_BATCH
from evl_cache.precision import device_named
from evl_cache.spec import FRAME_RULE, CacheSpec
from evl_cache.towers import Tower
from evl_cache.video import DecodeOptions
from evl_cache.video.pool import DEFAULT_TIMEOUT_S

OnClip = Callable[[bool], None]  # called with whether the clip failed
OnBottleneck = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExtractionJob:
    """One cache to make: of what, by what, where.

    Attributes:
        clips: the list, in the order of the cache's rows.
        root: folder of the videos, from which relative clip paths start.
        cache_path: directory of the cache.
        spec: what is stored of each clip.
        tower: makes the features.
        origin: names of the tower and the videos' folder, stored so that `repair` and `predict` find them again.
        known_missing: ids of clips without a file, which is allowed: they fail, and count for no limit of failures.

    Raises: UsageError where the clips or the tower are not those of the spec, or the spec's frames are chosen by a rule
        that only newer versions know.
    """

    clips: ClipList
    root: Path
    cache_path: Path
    spec: CacheSpec
    tower: Tower
    origin: Mapping[str, Any] = field(default_factory=dict)
    known_missing: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        clips, spec = self.clips, self.spec
        spec.check_frame_rule(self.cache_path)
        if (len(clips.clips), clips.content_id) != (spec.num_clips, spec.content_id):
            raise UsageError(
                f"{clips.source}: {len(clips.clips)} clips, content {clips.content_id[:12]}; the spec of "
                f"{self.cache_path} has {spec.num_clips}, content {spec.content_id[:12]}; give the list it was made of"
            )
        check_tower(self.tower, spec, self.cache_path)

    @property
    def new_frame_rule(self) -> int | None:
        """What the records of clips that are extracted now say of their frames: nothing where it is the cache's rule."""
        return FRAME_RULE if self.spec.by_older_rule else None

    def check_pixels(self, decoding: DecodeOptions) -> None:
        """Raises: UsageError for a decoder whose pixels are not the cache's."""
        if decoding.pixels != self.spec.pixels:
            raise UsageError(
                f"{self.cache_path} holds features of {self.spec.pixels} pixels, --decoder {decoding.decoder} on "
                f"{decoding.device} gives {decoding.pixels}; use the same decoder, or another cache"
            )


def check_tower(tower: Tower, spec: CacheSpec, cache_path: Path) -> None:
    """Raises: UsageError for a tower whose features are not those of the cache."""
    if replace(spec, tower=tower.spec).feature_id != spec.feature_id:
        raise UsageError(
            f"{cache_path} was made with {spec.tower.model} ({spec.tower.pretrained}), the tower given is "
            f"{tower.spec.model} ({tower.spec.pretrained}): their features differ; give the model and weights "
            "the cache was made with"
        )


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """How to extract; what is extracted is in the job.

    Attributes:
        device: where the tower runs.
        batch: samples of one forward pass; part of what makes bytes identical. By default what suits the device and the
            tower (see `batch_for`).
        decode_workers: processes that decode, and as many threads that crop. By default what the device and this
            process's share of the computer allow (see `workers_for`).
        compress_threads: threads that compress; by default likewise.
        retry_failed: try the clips that failed again.
        check_sources: hash the video of every clip that is done, and extract those again whose video is another now.
        retry_doubtful: in a cache whose frames an older rule chose, extract those clips again that may have other frames
            than they claim, and write into the marks that the rest is as the rule of today has it.
        reuse: directory of a cache whose rows of equal features and video files are copied.
        decoding: which decoder, and what to do with damaged frames; a clip's mark names the decoder that read it.
        clip_timeout_s: longest time for decoding one clip.
        most_failures: how many clips may fail before the run is stopped; compared before a block is written. By default
            5 % from the hundredth clip on, and 49 in a row.
        outage_patience_s: how long a disk that is away, or another want of the system's, is waited for before the run is
            stopped. By default 600 s, and 10 s before any video was read.
        lock_expiry_s: how long a lock stands without a sign of life; see `store.disk.locks`.
    """

    device: str = "cpu"
    batch: int | None = None
    decode_workers: int | None = None
    compress_threads: int | None = None
    retry_failed: bool = False
    check_sources: bool = False
    retry_doubtful: bool = False
    reuse: Path | None = None
    decoding: DecodeOptions = field(default_factory=DecodeOptions)
    clip_timeout_s: float = DEFAULT_TIMEOUT_S
    most_failures: FailureLimit | None = None
    outage_patience_s: float | None = None
    lock_expiry_s: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", device_named(self.device))
        for name in ("batch", "decode_workers", "compress_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        if self.batch is not None and self.batch > MOST_BATCH:
            raise UsageError(f"batch is {self.batch}; expected at most {MOST_BATCH}")
        if not self.clip_timeout_s > 0:
            raise UsageError(f"clip_timeout_s is {self.clip_timeout_s}; expected more than 0 seconds")
        if self.outage_patience_s is not None and not self.outage_patience_s >= 0:
            raise UsageError(f"outage_patience_s is {self.outage_patience_s}; expected 0 seconds or more")
