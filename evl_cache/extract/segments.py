"""Which frames of a file its clips are made of: all of it, or segments. n frames of a clip, V views, T frames of a view."""

from collections.abc import Callable, Sequence

import numpy as np

from evl_cache.clips import Clip, Segment
from evl_cache.errors import ClipError
from evl_cache.video import ByTime, Choose, Shown

# A table has 59.94 frames a second as decimals, 1.668333 for 1.668333..., so a frame counts from a millionth of a second
# before it is shown. Both ends of a segment are moved alike: of two that meet, each frame is in one.
_ROUNDING_S = 1e-6


class FrameChoice:
    """Chooses the frames of clips of one file, and keeps what it chose last: a decoder may ask again.

    Args:
        clips: of one file.
        pick: returns the frames of a clip's views among its own n, int64 (V, T), for n and the clip; as a whole file of n
            frames has them.

    Attributes:
        num_frames: n of each clip that has frames, by its place in `clips`.
        errors: why the others have none, by place.
    """

    def __init__(self, clips: Sequence[Clip], pick: Callable[[int, Clip], np.ndarray]) -> None:
        self._clips, self._pick = clips, pick
        self.num_frames: dict[int, int] = {}
        self.errors: dict[int, ClipError] = {}

    @property
    def choose(self) -> Choose:
        """What a decoder takes: it gives the views of the clips that have frames, one clip after the other."""
        if any(clip.segment is not None and clip.segment.unit == "seconds" for clip in self._clips):
            return ByTime(lambda shown: self._chosen(shown.count, shown))
        return lambda count: self._chosen(count, None)

    def _chosen(self, count: int, shown: Shown | None) -> np.ndarray:
        """Frame numbers of the views, int64 (clips x V, T). Raises: the last clip's ClipError where none has frames."""
        self.num_frames, self.errors = {}, {}
        chosen = []
        for place, clip in enumerate(self._clips):
            try:
                part = range(count) if clip.segment is None else frames_of_segment(clip.segment, count, shown)
                frames = self._pick(len(part), clip)
            except ClipError as error:
                self.errors[place] = error
                continue
            self.num_frames[place] = len(part)
            chosen.append(frames + part.start)
        if not chosen:
            raise self.errors[len(self._clips) - 1]
        return np.concatenate(chosen)


def frames_of_segment(segment: Segment, count: int, shown: Shown | None) -> range:
    """Return the numbers of a segment's frames among those of its file; an end beyond the file's is the file's.

    Args:
        segment: in seconds or frames.
        count: frames in the file.
        shown: when they are shown; needed for seconds only.

    Raises: ClipError with the numbers where the segment holds no frame.
    """
    if segment.unit == "frames":
        start, stop = int(segment.start), count if segment.end is None else min(int(segment.end), count)
    else:
        assert shown is not None  # a choice by seconds is a choice by time
        bounds = np.asarray([segment.start, np.inf if segment.end is None else segment.end]) - _ROUNDING_S
        start, stop = np.searchsorted(shown.seconds, bounds).tolist()
    if start < stop:
        return range(start, stop)
    last = f", the last at {shown.seconds[-1]:.3f} s" if shown is not None and count else ""
    raise ClipError(
        f"segment {segment} ({segment.unit}) holds no frame: the video has {count} frames{last}; "
        "expected a segment that begins before its end and holds at least one"
    )


def rows_by_video(rows: Sequence[int], clips: Sequence[Clip], *, most: int) -> list[list[int]]:
    """Return rows of clips in the groups that are decoded together: segments of one video, at most so many."""
    groups: list[list[int]] = []
    of_video: dict[str, list[int]] = {}
    for row in rows:
        clip = clips[row]
        group = of_video.get(clip.path)
        if clip.segment is None or group is None or len(group) >= most:
            group = []
            groups.append(group)
            if clip.segment is not None:
                of_video[clip.path] = group
        group.append(row)
    return groups
