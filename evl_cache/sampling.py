"""Choose the frames of a file that make a clip's views: index arithmetic without any video.

n frames in the file, T frames of a view, s frame stride, V temporal views.
The stride `auto` spreads a view over the clip: (n-1) // (T-1), at least 1.
Rounding is Python's `round` (half to even), as in the official loader.
Source: section 4 of arXiv 2208.03550 and the official data loader's rules.
"""

import numpy as np

from evl_cache.errors import ClipError, UsageError

AUTO_STRIDE = "auto"


def stride_of(num_frames_in_file: int, *, frames: int, stride: int | str) -> int:
    """Return the stride as a number: that of a view spread over the clip for `auto`, else what is given."""
    if stride == AUTO_STRIDE:
        return max(1, (num_frames_in_file - 1) // (frames - 1)) if frames > 1 else 1
    return int(stride)


def check_stride(stride: int | str | None) -> None:
    """Check the stride of views, None for TSN. Raises: UsageError for a word but `auto`, or a number below 1."""
    if isinstance(stride, str) and stride != AUTO_STRIDE:
        raise UsageError(f"stride {stride!r}; expected a number of frames, or {AUTO_STRIDE}")
    if not isinstance(stride, str) and stride is not None and stride < 1:
        raise UsageError(f"stride is {stride}; expected at least 1")


def frames_spanned(*, frames: int, stride: int) -> int:
    """Return how many frames of a file a view lies over: s(T-1)+1."""
    return stride * (frames - 1) + 1


def strided_test_views(
    num_frames_in_file: int, *, frames: int, stride: int | str, views: int = 1
) -> np.ndarray:
    """Return frame indices of V evenly spread views of T frames, s apart; s may be `auto`.

    A file shorter than s(T-1)+1 frames is padded with its last frame.

    Returns: int64 (views, frames), each in 0 .. num_frames_in_file-1.
    Raises: ClipError for an empty file; UsageError for a count below 1.
    """
    _check(num_frames_in_file, frames=frames, views=views)
    stride = stride_of(num_frames_in_file, frames=frames, stride=stride)
    _check(num_frames_in_file, stride=stride)
    span = frames_spanned(frames=frames, stride=stride)
    slack = max(num_frames_in_file, span) - span
    if views == 1:
        starts = [slack // 2]
    else:
        starts = [round(slack / (views - 1) * view) for view in range(views)]
    indices = np.asarray(starts, dtype=np.int64)[:, None] + stride * np.arange(frames, dtype=np.int64)
    clipped: np.ndarray = np.minimum(indices, num_frames_in_file - 1)
    return clipped


def tsn_test_views(num_frames_in_file: int, *, frames: int, views: int = 1) -> np.ndarray:
    """Return frame indices of V interleaved TSN views: frame i of view v is ((2iV + 2v + 1) n) // (2VT).

    Returns: int64 (views, frames). Raises: as `strided_test_views`.
    """
    _check(num_frames_in_file, frames=frames, views=views)
    position = 2 * np.arange(frames, dtype=np.int64) * views
    view = 2 * np.arange(views, dtype=np.int64)[:, None] + 1
    return ((position + view) * num_frames_in_file) // (2 * views * frames)


def strided_train_view(
    num_frames_in_file: int, *, frames: int, stride: int | str, rng: np.random.Generator
) -> np.ndarray:
    """Return frame indices of one random view of T frames, s apart; s may be `auto`.

    In a file that is too short (s(T-1)+1 >= n), frame i is i*s, or the last such index below n.

    Returns: int64 (frames,). Raises: as `strided_test_views`.
    """
    _check(num_frames_in_file, frames=frames)
    stride = stride_of(num_frames_in_file, frames=frames, stride=stride)
    _check(num_frames_in_file, stride=stride)
    steps = stride * np.arange(frames, dtype=np.int64)
    span = frames_spanned(frames=frames, stride=stride)
    if span >= num_frames_in_file:
        last = (num_frames_in_file - 1) // stride * stride
        return np.minimum(steps, last)
    return int(rng.integers(0, num_frames_in_file - span, endpoint=True)) + steps


def tsn_train_view(num_frames_in_file: int, *, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Return frame indices of one random TSN view.

    Frame i is uniform in round(g i) .. round(g (i+1)), with g = (n-1)/T.

    Returns: int64 (frames,). Raises: as `strided_test_views`.
    """
    _check(num_frames_in_file, frames=frames)
    gap = (num_frames_in_file - 1) / frames
    return np.asarray(
        [rng.integers(round(gap * i), round(gap * (i + 1)), endpoint=True) for i in range(frames)],
        dtype=np.int64,
    )


def _check(num_frames_in_file: int, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1")
    if num_frames_in_file < 1:
        raise ClipError(f"the video has {num_frames_in_file} frames; expected at least 1")
