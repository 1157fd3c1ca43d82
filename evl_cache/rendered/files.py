"""Write rendered frames as video files.

T frames, H and W pixels.
"""

import os
import secrets
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
    """Encode frames as 4:2:0 video; equal arguments give equal bytes.

    Args:
        path: whose suffix names the container.
        frames: uint8 (T, H, W, 3), RGB.
        fps: frames a second.
        codec: name of an FFmpeg encoder, such as `libx264` or `libvpx-vp9`.
        crf: the encoder's constant quality; the default is visually lossless for H.264.

    Raises: UsageError for other frames, an odd height or width, or an unknown encoder.
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
    if codec not in av.codecs_available:  # checked first, as opening the file creates it
        raise UsageError(f"this PyAV has no encoder {codec!r}; expected one such as libx264 or libvpx-vp9")
    path = Path(path)
    # Named as no other writer names it: two that render into one folder write the same clips.
    unfinished = path.with_name(f".tmp-{secrets.token_hex(8)}{path.suffix}")
    try:
        _encode(unfinished, frames, fps=fps, codec=codec, crf=crf)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _encode(path: Path, frames: Frames, *, fps: int, codec: str, crf: int) -> None:
    height, width = frames.shape[1:3]
    # Bit-exact, as a Matroska file has a random number otherwise.
    with av.open(str(path), "w", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1  # clips are small; several are written at once
        stream.options = _encoder_options(codec, crf)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _encoder_options(codec: str, crf: int) -> dict[str, object]:
    if codec.startswith("libvpx"):
        return {"crf": str(crf), "b": "0", "cpu-used": "5"}  # libvpx takes crf as quality only at bit rate 0
    if codec == "libsvtav1":
        return {"crf": str(crf), "preset": "10"}
    if codec != "libx264":
        return {"crf": str(crf)}
    # x264's macroblock tree reads uninitialised memory: with it one clip in a hundred has other bytes each time.
    return {"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"}
