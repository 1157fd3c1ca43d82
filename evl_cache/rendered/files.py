"""Rendered frames as video files.

T frames, H and W pixels.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.stream import VideoStream

from evl_cache.errors import UsageError

Frames = npt.NDArray[np.uint8]


def write_video(
    path: str | Path, frames: Frames, *, fps: int = 8, codec: str = "libx264", crf: int = 10
) -> None:
    """Encode RGB frames, uint8 (T, H, W, 3), as 4:2:0 video; the suffix of `path` names the container.

    `codec` is an FFmpeg encoder's name (`libx264`, `libvpx-vp9`); `crf` is its constant quality,
    where the default is visually lossless for H.264. Equal arguments give equal bytes.

    Raises: UsageError for frames of another kind, an odd height or width, or no such encoder.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise UsageError(
            f"frames are {frames.dtype} {frames.shape}; expected uint8 (T, H, W, 3) with at least one frame"
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UsageError(
            f"frames are {height} x {width} pixels; 4:2:0 video needs even sides: crop or pad them"
        )
    if codec not in av.codecs_available:  # asked first: opening the file already creates it
        raise UsageError(f"this PyAV has no encoder {codec!r}; expected one such as libx264 or libvpx-vp9")
    # Bit-exact: a Matroska file would carry a random number otherwise.
    with av.open(str(path), "w", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1  # clips are small: the pool of clips is the parallel part
        stream.options = _encoder_options(codec, crf)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _encoder_options(codec: str, crf: int) -> dict[str, object]:
    if codec.startswith("libvpx"):
        return {"crf": str(crf), "b": "0", "cpu-used": "5"}  # libvpx reads crf as quality only at bit rate 0
    if codec == "libsvtav1":
        return {"crf": str(crf), "preset": "10"}
    if codec != "libx264":
        return {"crf": str(crf)}
    # The macroblock tree reads memory it never wrote: with it one clip of a hundred has other bytes.
    return {"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"}
