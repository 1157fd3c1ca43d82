"""A clip's video made ready for the backbone: hashed, decoded, cropped; with a record of where it came from.

Segments of one video are made ready together: it is hashed once, and decoded once.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch  # before anything that decodes: see video

from evl_cache.clips import Clip
from evl_cache.errors import ClipError
from evl_cache.extract.augmentation import view_generator
from evl_cache.extract.crops import AugmentedViews, CroppedViews
from evl_cache.extract.outages import Surroundings
from evl_cache.extract.segments import FrameChoice
from evl_cache.preprocess import resize_as_several_threads
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
    train_view: int | None = None,
    surroundings: Surroundings | None = None,
    may_be_missing: bool = False,
) -> PreparedClip:
    """Hash, decode and crop one clip: `prepare_clips` of it alone."""
    (prepared,) = prepare_clips(
        [clip],
        root,
        tower=tower,
        views=views,
        decode=decode,
        train_view=train_view,
        surroundings=surroundings,
        may_be_missing=may_be_missing,
    )
    return prepared


def prepare_clips(
    clips: Sequence[Clip],
    root: Path,
    *,
    tower: TowerSpec,
    views: ViewSpec,
    decode: Decode,
    is_known: Callable[[Clip, str], bool] = lambda clip, sha256: False,
    train_view: int | None = None,
    surroundings: Surroundings | None = None,
    may_be_missing: bool = False,
) -> list[PreparedClip]:
    """Hash, decode and crop clips of one file. A clip that fails gives a record that says why, not an error.

    Args:
        clips: of one path: one clip, or segments.
        root: what relative paths are relative to.
        tower: gives image size, mean and std.
        views: what is cut from each clip.
        decode: gives the frames chosen of a file: `frames` of a `DecodePool`, as a decoder may crash, or hang.
        is_known: whether features of a clip (and the sha256 of its file) are at hand; such a clip is not decoded.
        train_view: only this one of the augmented training views.
        surroundings: of all clips of the run, with its patience; none is had by default.
        may_be_missing: the file was missing before the run began, and that was allowed.

    Returns: in the order of `clips`.
    Raises: Outage where the file cannot be read, and is not to blame.
    """
    drawn = _view_numbers(views) if train_view is None else (train_view,)
    path = root / clips[0].path
    around = surroundings or Surroundings(root)
    hash_file = around.hash_file if clips[0].segment is None else around.hash_once

    def attempt() -> list[PreparedClip]:
        try:
            size, sha256 = hash_file(path, may_be_missing=may_be_missing)
        except ClipError as error:
            return [
                PreparedClip(record=ClipRecord(id=clip.id, error=str(error)), samples=None) for clip in clips
            ]
        records = [ClipRecord(id=clip.id, source_bytes=size, source_sha256=sha256) for clip in clips]
        unknown = [place for place, clip in enumerate(clips) if not is_known(clip, sha256)]
        check = _Checks(lambda: around.check_unchanged(path, (size, sha256)), often=len(unknown) < 2)
        made = _prepared(
            lambda places: _decoded(
                decode, path, [clips[p] for p in places], [records[p] for p in places], tower, views, drawn
            ),
            unknown,
            check.after_a_complaint,
        )
        check.at_the_end()
        return [
            made.get(place) or PreparedClip(record=record, samples=None)
            for place, record in enumerate(records)
        ]

    return around.patiently(attempt)


def _prepared(
    decoded: Callable[[Sequence[int]], list[PreparedClip]],
    places: Sequence[int],
    check_unchanged: Callable[[], None],
) -> dict[int, PreparedClip]:
    """Return clips by their places, decoded together as far as that gives what each would be alone.

    A decoder complains of all that it was asked for, and takes the time of all. Then each half is decoded for itself, so
    that a clip fails for its own frames only; damage in one region costs a few decodes more.

    Args:
        decoded: decodes clips once; where a decoder complains of several, it raises `_Complaint`.
        places: of the clips to decode.
        check_unchanged: reads the file again.

    Raises: Outage as `check_unchanged` does.
    """
    if len(places) < 2:
        return {place: _believed(partial(decoded, [place]), check_unchanged) for place in places}
    try:
        return dict(zip(places, decoded(places), strict=True))
    except _Complaint:
        halves = places[: len(places) // 2], places[len(places) // 2 :]
        first, second = (_prepared(decoded, half, check_unchanged) for half in halves)
        return first | second


class _Checks:
    """Looks whether a file is what it was when it was hashed, where a decoder complained of it.

    A long video is read whole for that: of many segments it is done after the first complaint and at the end.

    Args:
        check: reads the file.
        often: whether to do it after each complaint.
    """

    def __init__(self, check: Callable[[], None], *, often: bool) -> None:
        self._check, self._often, self._complaints = check, often, 0

    def after_a_complaint(self) -> None:
        """Look, where that is due. Raises: Outage where the file is another, or cannot be read."""
        self._complaints += 1
        if self._often or self._complaints == 1:
            self._check()

    def at_the_end(self) -> None:
        """Look once more after several complaints. Raises: as `after_a_complaint`."""
        if not self._often and self._complaints > 1:
            self._check()


class _Complaint(Exception):
    """A decoder complained of clips that were decoded together."""


def _believed(decoded: Callable[[], list[PreparedClip]], check_unchanged: Callable[[], None]) -> PreparedClip:
    """Decode a clip, and where a decoder complained, until it did twice, or was content twice.

    It complains of a disk that fails beneath it, too, and of real damage not always.

    Args:
        decoded: returns the clip, or a record of what a decoder complained of.
        check_unchanged: reads the file again.

    Raises: Outage as `check_unchanged` does.
    """
    outcomes: Counter[str | None] = Counter()
    while True:
        (prepared,) = decoded()
        complaint = prepared.record.error
        if complaint is None and not outcomes:
            return prepared
        if complaint is not None:
            check_unchanged()
        outcomes[complaint] += 1
        if outcomes[complaint] == 2 or outcomes.total() == _MOST_DECODES:
            return prepared


def _decoded(
    decode: Decode,
    path: Path,
    clips: Sequence[Clip],
    records: Sequence[ClipRecord],
    tower: TowerSpec,
    views: ViewSpec,
    drawn: Sequence[int],
) -> list[PreparedClip]:
    """Return clips of one file, decoded once; records: of the same clips. Raises: _Complaint where several fail."""
    choice = FrameChoice(clips, lambda count, clip: choose_frames(count, views, clip.id, drawn))
    try:
        made = _crop(decode(path, choice.choose), clips, choice, tower, views, drawn)
    except ClipError as error:
        if len(choice.errors) == len(clips) > 1:  # ours: no decoder complained
            return [
                PreparedClip(record=replace(source, error=str(choice.errors[place])), samples=None)
                for place, source in enumerate(records)
            ]
        if len(clips) > 1:
            raise _Complaint from error
        return [PreparedClip(record=replace(records[0], error=str(error)), samples=None)]
    header, indices = made.header, iter(made.indices)
    samples = iter(made.samples)
    prepared = []
    for place, source in enumerate(records):
        if place in choice.errors:
            refused = replace(source, error=str(choice.errors[place]))
            prepared.append(PreparedClip(record=refused, samples=None))
            continue
        record = replace(
            source,
            frame_size=header.frame_size,
            frame_count=header.num_frames_in_file,
            indices=tuple(tuple(view) for view in next(indices).tolist()),
            decoder=header.decoder,
        )
        prepared.append(PreparedClip(record=record, samples=next(samples)))
    return prepared


def _crop(
    events: Iterator[FrameEvent],
    clips: Sequence[Clip],
    choice: FrameChoice,
    tower: TowerSpec,
    views: ViewSpec,
    drawn: Sequence[int],
) -> CroppedViews | AugmentedViews:
    """The samples of those clips that have frames."""
    making: CroppedViews | AugmentedViews | None = None
    with contextlib.closing(events):  # type: ignore[type-var]  # a generator
        for event in events:
            if isinstance(event, ClipHeader):
                chosen = choice.num_frames
                making = (
                    AugmentedViews(
                        event,
                        [_generators(clips[p].id, n, views, drawn) for p, n in chosen.items()],
                        tower,
                        views,
                    )
                    if views.train_views
                    else CroppedViews(event, len(chosen), tower, views)
                )
            else:
                assert making is not None  # a header comes first; another one begins anew
                making.add(event)
    assert making is not None  # else ClipError was raised
    return making


def _view_numbers(views: ViewSpec) -> range:
    """The augmented views, each of which is drawn by its number alone."""
    return range(views.first_view, views.first_view + views.train_views)


def _generators(
    clip_id: str, num_frames: int, views: ViewSpec, drawn: Sequence[int]
) -> list[np.random.Generator]:
    """The generator of each training view, after what `choose_frames` draws of it: its frames come first."""
    generators = [view_generator(views.augment_seed, clip_id, view) for view in drawn]
    for rng in generators:
        _train_indices(num_frames, views, rng)
    return generators


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
