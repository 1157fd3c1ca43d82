"""How decoded pictures become RGB. H and W stored pixels.

Measured with decord 0.6.0 (FFmpeg 4.1), decord2 3.4.0 (8.1) and PyAV 18.1 (8.1); `tests/video/test_pixels.py` has a case of
each kind. All give the same bytes for 8-bit pictures of even height that are not interlaced. Elsewhere
swscale interpolates chroma, bicubically for decord and bilinearly for PyAV, or takes fields apart.
"""

import errno
import warnings
from collections.abc import Set
from typing import TYPE_CHECKING

import numpy as np

from evl_cache.errors import ClipError

if TYPE_CHECKING:
    import av

_ALIKE_FORMATS = ("yuv420p", "yuvj420p")
# Numbers of ITU-T H.273. swscale refuses the others; FFmpeg before 8 converted them as if they were BT.601.
_CONVERTED_MATRICES = (0, 1, 2, 3, 4, 5, 6, 7, 9)
_BT2020_CONSTANT_LUMINANCE = 10
# Of 1 to 2,100: decord 0.6 fails with an error about sizes. decord2 does not at 72, but at three others.
OLD_MISCOPIED_WIDTHS = frozenset((1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 72))
MISCOPIED_WIDTHS = OLD_MISCOPIED_WIDTHS | {32, 96, 144}


def rgb(frame: "av.VideoFrame") -> np.ndarray:
    """Return a frame as uint8 (H, W, 3), neither turned nor scaled; the alpha channel is ignored.

    Raises: ClipError where swscale cannot convert its colours; MemoryError where there is none for it.
    """
    import av
    from av.video.reformatter import Colorspace

    is_constant = int(frame.colorspace) == _BT2020_CONSTANT_LUMINANCE
    source = Colorspace.BT2020 if is_constant else None  # what FFmpeg took it for before it refused it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # swscale remarks on unusual colour ranges
        try:
            # Bytes are the same with any number of threads; to start them costs more than they save of a small picture.
            picture: np.ndarray = frame.to_ndarray(format="rgb24", src_colorspace=source, threads=1)
        except (av.FFmpegError, OSError) as error:
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in (
                errno.ENOMEM,
                errno.EAGAIN,
            ):
                raise MemoryError from error
            raise ClipError(
                f"its colours cannot be converted to RGB (pixel format {frame.format.name}, "
                f"matrix {int(frame.colorspace)} of ITU-T H.273); encode it again with a usual one, such as BT.709"
            ) from error
    return picture


def decord_converts_alike(coded: "av.VideoCodecContext", *, miscopied: Set[int] = MISCOPIED_WIDTHS) -> bool:
    """Whether decord gives the same RGB as `rgb` for a stream's pictures, as far as it can be told before they are decoded.

    Of H.264, `h264.is_progressive` and `h264.changes_pictures` must be asked as well; of MPEG-4 both decoders differ by 1
    or 2 of 255 in some pixels even so.

    Args:
        miscopied: widths that are not for it; by default those of decord and those of decord2.
    """
    return (
        coded.pix_fmt in _ALIKE_FORMATS
        and coded.height % 2 == 0
        and coded.width not in miscopied
        and int(coded.colorspace) in _CONVERTED_MATRICES
    )
