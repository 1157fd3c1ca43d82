"""How a file's pictures are to be turned and mirrored, by its display matrix. H and W stored pixels.

A display matrix is FFmpeg's: nine integers, of which m[0], m[1], m[3] and m[4] say where the axes go. It comes from mp4's
`tkhd` and `mvhd`, from Matroska's projection, or from a message within an H.264 or HEVC stream.
"""

import math
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import numpy as np

from evl_cache.errors import ClipError

if TYPE_CHECKING:
    import av
    from av.sidedata.sidedata import SideData

Matrix = tuple[int, ...]

_MATRIX = struct.Struct("=9i")
_MOST_OFF_DEGREES = 1  # FFmpeg leaves a tilt of one degree alone, too


def display_matrix(frame: "av.VideoFrame") -> Matrix | None:
    """Return the display matrix that comes with a frame; None where there is none.

    A container's matrix comes with every frame. One within the stream comes with a key frame, and holds until another
    one comes: who decodes from the start keeps the last one, and who seeks may miss it.
    """
    entries = cast("Iterable[SideData]", frame.side_data)  # PyAV's stub declares another type
    for data in entries:  # of two FFmpeg takes the first; a look-up by type would give the last
        if data.type.name == "DISPLAYMATRIX" and data.buffer_size >= _MATRIX.size:
            return _MATRIX.unpack_from(bytes(data))
    return None


def upright(picture: np.ndarray, matrix: Matrix | None) -> np.ndarray:
    """Return a picture (H, W, C) as it is to be shown, contiguous: (H, W, C), or (W, H, C) where it is turned by 90 degrees.

    Turns and mirrors are those that the `ffmpeg` command makes by itself. Sizes and shears are ignored, as it does.

    Raises: ClipError for a turn by no right angle.
    """
    if matrix is None:
        return np.ascontiguousarray(picture)
    degrees = _clockwise_degrees(matrix)
    if degrees is None:  # an axis vanishes
        return np.ascontiguousarray(picture)
    quarters = round(degrees / 90)
    if abs(degrees - 90 * quarters) > _MOST_OFF_DEGREES:
        raise ClipError(
            f"its display matrix turns pictures by {degrees} degrees; expected a multiple of 90: "
            "encode it again with ffmpeg, which turns the pictures themselves"
        )
    match quarters % 4:
        case 0:
            shown = picture[::-1] if matrix[4] < 0 else picture
        case 1:
            shown = picture.swapaxes(0, 1) if matrix[3] > 0 else np.rot90(picture, -1)
        case 2:
            across = picture[:, ::-1] if matrix[0] < 0 else picture
            shown = across[::-1] if matrix[4] < 0 else across
        case _:
            shown = np.rot90(picture, 2).swapaxes(0, 1) if matrix[3] < 0 else np.rot90(picture, 1)
    return np.ascontiguousarray(shown)


def is_plain_turn(matrix: Matrix | None) -> bool:
    """Whether a matrix turns by exactly 0, 90, 180 or 270 degrees and does not mirror: decord shows an mp4 with it rightly.

    decord takes mirrors for turns, ignores tilts, and does not see the matrices of other containers and of streams.
    """
    if matrix is None:
        return True
    across, right_down, down_right, down = matrix[0], matrix[1], matrix[3], matrix[4]
    straight = right_down == down_right == 0 and across * down > 0
    sideways = across == down == 0 and right_down * down_right < 0
    return straight or sideways


def _clockwise_degrees(matrix: Matrix) -> int | None:
    """Return by how much a matrix turns, 0 to 360; None where it leaves no axis to tell by."""
    first, second = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not first or not second:
        return None
    return round(math.degrees(math.atan2(matrix[1] / second, matrix[0] / first))) % 360
