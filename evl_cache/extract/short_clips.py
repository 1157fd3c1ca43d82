"""Clips with fewer frames than a view lies over: their views repeat the last frame, which no picture of a run would tell.

Told before the work by what headers of some of the files say, and afterwards by what was decoded.
"""

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import numpy as np

from evl_cache.clips import Clip
from evl_cache.errors import ClipError, Outage, WorkerError, reason_alone
from evl_cache.notation import counted
from evl_cache.sampling import frames_spanned
from evl_cache.spec import ViewSpec
from evl_cache.video import Length
from evl_cache.video.pool import DecodePool

MOST_LOOKED_AT = 200
_LOOK_S, _CLIP_S = 4.0, 1.0  # seconds for all of them, and for one
_LOOKERS = 2
_ROUNDING = 1e-3  # of a frame
_FITTED = 0.9  # share of clips that a stride should fit


@dataclass(frozen=True, kw_only=True)
class ShortClips:
    """How long clips are, against what a view lies over.

    Attributes:
        clips: of the list.
        asked: whose headers were asked for.
        looked_at: whose headers told a length.
        short: those of them with fewer frames than a view lies over.
        frames: of a view.
        stride: of a view.
        median: frames of the clip in the middle; None where none was looked at.
        fitting_stride: the largest with which nine of ten are long enough; None where none was looked at.
        unreadable: why the first that could not be read could not, or which segment holds no frame; None where all could.
        failed: how many those are.
    """

    clips: int
    asked: int
    looked_at: int
    short: int
    frames: int
    stride: int
    median: int | None
    fitting_stride: int | None
    unreadable: str | None
    failed: int

    def told(self) -> list[str]:
        """Return what a person should know before the work, a line each; none where clips are there and long enough."""
        bad = f"{self.failed} of {counted(self.asked, 'clip')} looked at cannot be opened, or hold no frame"
        lines = [f"{bad}; the first: {self.unreadable}"] if self.failed else []
        return [*lines, *filter(None, [self._told_short()])]

    def _told_short(self) -> str | None:
        if not self.short or self.fitting_stride is None:
            return None
        whole = self.looked_at == self.clips
        of = counted(self.clips, "clip") if whole else f"{counted(self.looked_at, 'clip')} looked at"
        is_one = self.short == 1
        fits = (
            f"--stride {self.fitting_stride} fits nine of ten, " if self.fitting_stride < self.stride else ""
        )
        return (
            f"{self.short} of {of} {'has' if is_one else 'have'} fewer frames than a view lies over "
            f"({frames_spanned(frames=self.frames, stride=self.stride)} = {self.stride} x {self.frames - 1} + 1): "
            f"{'its' if is_one else 'their'} views repeat the last frame; median {self.median} frames: {fits}"
            "--stride auto spreads each view over its clip"
        )


def look_for_short(
    clips: Sequence[Clip], root: Path, views: ViewSpec, *, skipped: frozenset[str] = frozenset()
) -> ShortClips | None:
    """Ask headers of up to `MOST_LOOKED_AT` clips, spread over the list, for some seconds at most; None where none can be short.

    Args:
        skipped: ids of clips whose file is known to be missing.
    """
    if not isinstance(views.stride, int) or views.frames == 1:
        return None
    rows = np.unique(np.linspace(0, len(clips) - 1, min(len(clips), MOST_LOOKED_AT)).round().astype(int))
    asked = [clip for row in rows.tolist() if (clip := clips[row]).id not in skipped]
    lengths, failed = _lengths(asked, *_look(asked, root))
    return _judge(lengths, views.frames, views.stride, len(clips), len(asked), failed)


def _judge(
    lengths: Sequence[int], frames: int, stride: int, clips: int, asked: int, failed: Sequence[str]
) -> ShortClips:
    spanned = frames_spanned(frames=frames, stride=stride)
    fitted = sorted(lengths)[int((1 - _FITTED) * len(lengths) + 1e-9)] if lengths else None
    return ShortClips(
        clips=clips,
        asked=asked,
        looked_at=len(lengths),
        short=sum(length < spanned for length in lengths),
        frames=frames,
        stride=stride,
        median=median_low(lengths) if lengths else None,
        fitting_stride=None if fitted is None else max(1, (fitted - 1) // (frames - 1)),
        unreadable=failed[0] if failed else None,
        failed=len(failed),
    )


def _look(clips: Sequence[Clip], root: Path) -> tuple[dict[str, Length], dict[str, str]]:
    """Return what headers say of the clips' files that could be looked at in time, and why others cannot be read, by path."""
    until_s = time.monotonic() + _LOOK_S
    reasons: dict[str, str] = {}
    told: dict[str, Length] = {}
    with DecodePool(_LOOKERS, timeout_s=_CLIP_S) as pool, ThreadPoolExecutor(_LOOKERS) as threads:

        def look(path: str) -> None:
            if time.monotonic() > until_s:
                return
            try:
                told[path] = pool.length(root / path)
            except ClipError as error:
                reasons[path] = reason_alone(str(error), str(root / path))
            except (Outage, WorkerError):  # as of a slow disk: the run itself will judge the file
                return

        list(threads.map(look, dict.fromkeys(clip.path for clip in clips)))
    return told, reasons


def _lengths(
    clips: Sequence[Clip], told: Mapping[str, Length], reasons: Mapping[str, str]
) -> tuple[list[int], list[str]]:
    """Return frames of the clips that have some, and why others cannot be read or have none."""
    found: list[int] = []
    failed = [f"{clip.path}: {reasons[clip.path]}" for clip in clips if clip.path in reasons]
    for clip in clips:
        length = told.get(clip.path)
        frames = None if length is None else _frames(clip, length)
        if frames:
            found.append(frames)
        elif frames == 0 and length is not None:
            failed.append(f"{clip.id}: the video has about {counted(length.frames, 'frame')}")
    return found, failed


def _frames(clip: Clip, length: Length) -> int | None:
    """Return the frames of a clip, of a segment its own; None where the header does not tell them."""
    segment = clip.segment
    if segment is None:
        return length.frames
    if segment.unit == "seconds" and length.rate is None:
        return None
    unit = length.rate if segment.unit == "seconds" and length.rate is not None else 1.0
    end = length.frames if segment.end is None else min(length.frames, segment.end * unit)
    # As `frames_of_segment`: frames shown from the start on and before the end.
    return max(0, math.ceil(end - _ROUNDING) - math.ceil(segment.start * unit - _ROUNDING))
