"""What stage two trains on: a source of samples, and the loader that gives them in batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from evl_cache.batches.batch import Batch, LoaderTimes
from evl_cache.clips import Clip
from evl_cache.spec import CacheSpec
from evl_cache.store import Indices, rows_of

DEFAULT_BATCH = 64  # samples of a step or of a scored batch, unless told otherwise


class Source(Protocol):
    """What samples are rows of: a cache, or live videos in its place. Attributes as `FeatureCache`."""

    @property
    def spec(self) -> CacheSpec:
        """What the features are."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (samples,)."""

    @property
    def sample_clips(self) -> np.ndarray:
        """int64 (samples,): row of `clips`."""

    @property
    def clips(self) -> Sequence[Clip]:
        """Every clip, in order."""

    @property
    def place(self) -> str:
        """Where it lies, as it may be shown."""

    @property
    def fingerprint(self) -> str:
        """Digest of the features."""

    @property
    def origin(self) -> Mapping[str, Any]:
        """Where the tower came from (`model`, `pretrained`), as far as it is known."""


class Loader(Protocol):
    """Batches of some samples of a source, in an order drawn anew for each epoch. See `FeatureLoader`."""

    samples: np.ndarray
    times: LoaderTimes

    @property
    def cache(self) -> Source:
        """What the samples are rows of."""

    @property
    def labels(self) -> np.ndarray:
        """The label of each sample of the source as it is served, int64: a class number of the head."""

    @property
    def waits_for_server(self) -> bool:
        """Whether batches may have to be waited for until a server answers; one that is silent may keep some for minutes."""

    @property
    def sample_nbytes(self) -> int:
        """The bytes of a sample as it is stored, decompressed; 0 if none is stored."""

    @property
    def skipped_clips(self) -> int:
        """Clips asked for that have no features."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(self, number: int = 0, *, start_batch: int = 0) -> Iterator[Batch]:
        """Yield every sample once, in batches, from batch `start_batch` on."""


def samples_of_clips(source: Source, clips: Indices | None) -> np.ndarray:
    """Return the rows of the samples of some clips, int64, in the order of the samples; None stands for all clips.

    Args:
        clips: rows of the clip list, one or several; a slice; or a mask of all clips.

    Raises: UsageError for anything else, and for a clip that is not there.
    """
    if clips is None:
        return np.arange(len(source.sample_clips), dtype=np.int64)
    rows = rows_of(clips, len(source.clips), what="clip", place=source.place)
    is_named = np.zeros(len(source.clips), dtype=bool)
    is_named[rows] = True
    return np.flatnonzero(is_named[source.sample_clips])
