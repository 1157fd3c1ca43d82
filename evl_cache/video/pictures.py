"""Decoded pictures as events: upright, RGB, with a header before them. H and W source pixels."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video.frames import ClipHeader, FrameEvent
from evl_cache.video.orientation import Matrix, upright
from evl_cache.video.pixels import rgb

if TYPE_CHECKING:
    import av


def picture_of(path: str | Path, frame: "av.VideoFrame", matrix: Matrix | None) -> np.ndarray:
    """Return a frame as uint8 (H, W, 3), turned and mirrored as its display matrix says.

    Raises: ClipError for a turn by no right angle, or strange colours.
    """
    try:
        return upright(rgb(frame), matrix)
    except ClipError as error:
        raise ClipError(f"{path}: {error}") from error


def with_header(
    path: str | Path, pictures: Iterable[np.ndarray], indices: np.ndarray, count: int
) -> Iterator[FrameEvent]:
    """Yield a header, then the pictures (H, W, 3) as pieces of one. Raises: ClipError where their size changes."""
    import av

    size: tuple[int, ...] | None = None
    for picture in pictures:
        if size is None:
            size = picture.shape
            yield ClipHeader(
                indices=indices,
                num_frames_in_file=count,
                frame_size=(size[0], size[1]),
                decoder=f"PyAV {av.__version__}",
            )
        if picture.shape != size:
            raise ClipError(f"{path}: cannot be decoded (frames change their size within the file)")
        yield picture[None]
