"""A clip's video made ready for the backbone: hashed, decoded, cropped; with a record of where it came from."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch  # before anything that decodes: see video

from evl_cache.clips import Clip
from evl_cache.errors import ClipError
from evl_cache.extract.augmentation import ViewAugmentation, view_generator
from evl_cache.extract.outages import Surroundings
from evl_cache.preprocess import resize_as_several_threads, spatial_crops
from evl_cache.processes import single_threaded
from evl_cache.sampling import strided_test_views, strided_train_view, tsn_test_views, tsn_train_view
from evl_cache.spec import TowerSpec, ViewSpec
from evl_cache.store import ClipRecord
from evl_cache.video import Choose, ClipHeader, FrameEvent

Decode = Callable[[Path, Choose], Iterator[FrameEvent]]
_MOST_DECODES = 5  # of a clip whose decoder says something else each time


@dataclass(frozen=True, kw_only=True)
class PreparedClip:
    """One clip before the forward pass.

    Attributes:
        record: where it came from, or why it failed.
        samples: float32 (samples of the clip, T, 3, S, S), spatial views first, temporal within, or training views
            by number; None where it failed or need not be decoded.
        is_kept: what the cache holds of it stays.
    """

    record: ClipRecord
    samples: torch.Tensor | None
    is_kept: bool = False


def begin_crop_thread(several: bool) -> None:
    """Begin a thread that prepares clips beside others: it crops alone, to the bits that torch's threads would make.

    The initializer of the executor whose threads call `prepare_clip`.

    Args:
        several: whether torch has several threads in the thread that starts the executor.
    """
    if several:
        resize_as_several_threads()
    single_threaded()


def prepare_clip(
    clip: Clip,
    root: Path,
    *,
    tower: TowerSpec,
    views: ViewSpec,
    decode: Decode,
    is_known: Callable[[str, str], bool] = lambda clip_id, sha256: False,
    train_view: int | None = None,
    surroundings: Surroundings | None = None,
    may_be_missing: bool = False,
) -> PreparedClip:
    """Hash, decode and crop one clip. A clip that fails gives a record that says why, not an error.

    Args:
        root: what relative paths are relative to.
        tower: gives image size, mean and std.
        views: what is cut from the clip.
        decode: gives the frames chosen of a file: `frames` of a `DecodePool`, as a decoder may crash, or hang.
        is_known: whether features of a clip (id, sha256 of its file) are at hand; such a clip is not decoded.
        train_view: only this one of the augmented training views.
        surroundings: of all clips of the run, with its patience; none is had by default.
        may_be_missing: the file was missing before the run began, and that was allowed.

    Raises: Outage where the clip cannot be read, and is not to blame.
    """
    drawn = _view_numbers(views) if train_view is None else (train_view,)
    path = root / clip.path
    around = surroundings or Surroundings(root)

    def attempt() -> PreparedClip:
        try:
            size, sha256 = around.hash_file(path, may_be_missing=may_be_missing)
        except ClipError as error:
            return PreparedClip(record=ClipRecord(id=clip.id, error=str(error)), samples=None)
        source = ClipRecord(id=clip.id, source_bytes=size, source_sha256=sha256)
        if is_known(clip.id, sha256):
            return PreparedClip(record=source, samples=None)
        return _believed(
            lambda: _decoded(
                decode(path, lambda count: choose_frames(count, views, clip.id, drawn)),
                clip,
                source,
                tower,
                views,
                drawn,
            ),
            lambda: around.check_unchanged(path, (size, sha256)),
        )

    return around.patiently(attempt)


def _believed(decoded: Callable[[], PreparedClip], check_unchanged: Callable[[], None]) -> PreparedClip:
    """Decode a clip, and where a decoder complained, until it did twice, or was content twice.

    It complains of a disk that fails beneath it, too, and of real damage not always.

    Args:
        decoded: returns the clip, or a record of what a decoder complained of.
        check_unchanged: reads the file again.

    Raises: Outage as `check_unchanged` does.
    """
    outcomes: Counter[str | None] = Counter()
    while True:
        prepared = decoded()
        complaint = prepared.record.error
        if complaint is None and not outcomes:
            return prepared
        if complaint is not None:
            check_unchanged()
        outcomes[complaint] += 1
        if outcomes[complaint] == 2 or outcomes.total() == _MOST_DECODES:
            return prepared


def _decoded(
    events: Iterator[FrameEvent],
    clip: Clip,
    source: ClipRecord,
    tower: TowerSpec,
    views: ViewSpec,
    drawn: Sequence[int],
) -> PreparedClip:
    """A clip decoded once."""
    try:
        header, samples = _crop(events, clip, tower, views, drawn)
    except ClipError as error:
        return PreparedClip(record=replace(source, error=str(error)), samples=None)
    record = replace(
        source,
        frame_size=header.frame_size,
        frame_count=header.num_frames_in_file,
        indices=tuple(tuple(int(i) for i in view) for view in header.indices),
        decoder=header.decoder,
    )
    return PreparedClip(record=record, samples=samples)


def _crop(
    events: Iterator[FrameEvent], clip: Clip, tower: TowerSpec, views: ViewSpec, drawn: Sequence[int]
) -> tuple[ClipHeader, torch.Tensor]:
    """The samples of a clip, made from each frame as it comes, so that few large frames are held at a time."""
    making: _TestViews | _TrainViews | None = None
    with contextlib.closing(events):  # type: ignore[type-var]  # a generator
        for event in events:
            if isinstance(event, ClipHeader):
                making = (
                    _TrainViews(event, clip.id, tower, views, drawn)
                    if views.train_views
                    else _TestViews(event, tower, views)
                )
            else:
                assert making is not None  # a header comes first; another one begins anew
                making.add(event)
    assert making is not None  # else ClipError was raised
    return making.header, making.samples


class _TestViews:
    """Crops of temporal views, from frames as they come."""

    def __init__(self, header: ClipHeader, tower: TowerSpec, views: ViewSpec) -> None:
        self.header, self._tower = header, tower
        self._positions = header.positions  # (V,T)
        size = tower.image_size
        self._crops = torch.empty(views.spatial_views, *self._positions.shape, 3, size, size)
        self.samples = self._crops.flatten(0, 1)  # the same memory, (spatial x temporal views,T,3,S,S)
        self._added = 0

    def add(self, frames: np.ndarray) -> None:
        tower = self._tower
        crops = spatial_crops(
            frames, size=tower.image_size, mean=tower.mean, std=tower.std, crops=len(self._crops)
        )  # (crops,some,3,S,S)
        for number in range(len(frames)):
            for view, t in np.argwhere(self._positions == self._added + number).tolist():
                self._crops[:, view, t] = crops[:, number]
        self._added += len(frames)


class _TrainViews:
    """Augmented views, from frames as they come; their random parts are drawn before the first."""

    def __init__(
        self, header: ClipHeader, clip_id: str, tower: TowerSpec, views: ViewSpec, drawn: Sequence[int]
    ) -> None:
        self.header, self._tower = header, tower
        self._positions = header.positions
        self._augmentations = []
        height, width = header.frame_size
        for view in drawn:
            rng = view_generator(views.augment_seed, clip_id, view)
            # As `choose_frames` drew them: what follows comes after it from the generator.
            _train_indices(header.num_frames_in_file, views, rng)
            self._augmentations.append(
                ViewAugmentation.draw(rng, height=height, width=width, flip=views.flip)
            )
        size = tower.image_size
        self.samples = torch.empty(*self._positions.shape, 3, size, size)  # (views drawn,T,3,S,S)
        self._added = 0

    def add(self, frames: np.ndarray) -> None:
        tower = self._tower
        for frame in frames:
            for view, augmentation in enumerate(self._augmentations):
                places = np.flatnonzero(self._positions[view] == self._added)
                if len(places):
                    self.samples[view, places] = augmentation.apply(
                        frame[None], size=tower.image_size, mean=tower.mean, std=tower.std
                    )
            self._added += 1


def _view_numbers(views: ViewSpec) -> range:
    """The augmented views, each of which is drawn by its number alone."""
    return range(views.first_view, views.first_view + views.train_views)


def _train_indices(count: int, views: ViewSpec, rng: np.random.Generator) -> np.ndarray:
    if views.sampling == "tsn":
        return tsn_train_view(count, frames=views.frames, rng=rng)
    assert views.stride is not None
    return strided_train_view(count, frames=views.frames, stride=views.stride, rng=rng)


def choose_frames(
    num_frames_in_file: int, views: ViewSpec, clip_id: str, drawn: Sequence[int] | None = None
) -> np.ndarray:
    """Frame indices of every temporal view, int64 (views, T): drawn for training views, else by the test sampling.

    Args:
        drawn: only these of the training views.
    """
    if views.train_views:
        wanted = _view_numbers(views) if drawn is None else drawn
        generators = (view_generator(views.augment_seed, clip_id, view) for view in wanted)
        return np.stack([_train_indices(num_frames_in_file, views, rng) for rng in generators])
    if views.sampling == "tsn":
        return tsn_test_views(num_frames_in_file, frames=views.frames, views=views.temporal_views)
    assert views.stride is not None
    return strided_test_views(
        num_frames_in_file, frames=views.frames, stride=views.stride, views=views.temporal_views
    )
