"""Frames out of video files. The only module that knows decord, and PyAV as a decoder.

decord first: it is fast and exact on healthy files. PyAV for what decord cannot open, such as AV1.
T frames asked for, H and W source pixels.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch  # noqa: F401  torch must be imported before decord: their bundled libraries clash otherwise

from evl_cache.errors import ClipError, UsageError

DECODERS = ("auto", "decord", "pyav")

Choose = Callable[[int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """Frames of one clip and where they came from.

    Attributes:
        frames: uint8 (distinct frames, H, W, 3), RGB, at source resolution, in the order of the file.
        positions: int64 (views, T): row of `frames` for each frame of each view.
        indices: int64 (views, T): frame numbers in the file.
        num_frames_in_file: as the decoder counts them.
        decoder: which library served, with its version.
    """

    frames: np.ndarray
    positions: np.ndarray
    indices: np.ndarray
    num_frames_in_file: int
    decoder: str

    def view(self, number: int) -> np.ndarray:
        """Frames of one temporal view, uint8 (T, H, W, 3)."""
        frames: np.ndarray = self.frames[self.positions[number]]
        return frames


def decode_clip(path: str | Path, choose: Choose, *, decoder: str = "auto") -> DecodedClip:
    """Decode only the frames that `choose(num_frames_in_file) -> (views, T)` asks for, each once.

    Args:
        decoder: `decord`, `pyav`, or `auto`: decord, and PyAV where decord cannot read the file.

    Raises: ClipError with the reason where the file cannot be read; UsageError for another decoder.
    """
    if decoder not in DECODERS:
        raise UsageError(f"decoder {decoder!r}; expected one of {', '.join(DECODERS)}")
    if decoder == "pyav":
        return _with_pyav(path, choose)
    try:
        return _with_decord(path, choose)
    except ClipError as refused:
        if decoder == "decord":
            raise
        try:
            return _with_pyav(path, choose)
        except ClipError as error:
            raise ClipError(f"{refused}; PyAV: {_reason(error.__cause__ or error)}") from error


def _with_decord(path: str | Path, choose: Choose) -> DecodedClip:
    import decord

    try:
        # A new, single-threaded reader a clip: a reused one leaks, and threads inside a worker fight.
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        count = len(reader)
        indices = choose(count)
        distinct, positions = np.unique(indices, return_inverse=True)
        frames = reader.get_batch(distinct).asnumpy()
    except (decord.DECORDError, decord.DECORDLimitReachedError, OSError, RuntimeError) as error:
        raise ClipError(f"{path}: cannot be decoded ({_reason(error)})") from error
    return DecodedClip(
        frames=frames,
        positions=positions.reshape(indices.shape),
        indices=indices,
        num_frames_in_file=count,
        decoder=f"decord {decord.__version__}",
    )


def _with_pyav(path: str | Path, choose: Choose) -> DecodedClip:
    """Decodes the file twice, to count its frames and to take some: what containers say of their number may be wrong."""
    import av

    try:
        count = sum(1 for _ in _pictures(path))
        indices = choose(count)
        distinct, positions = np.unique(indices, return_inverse=True)
        wanted = set(distinct.tolist())
        frames = [_upright(frame) for number, frame in enumerate(_pictures(path)) if number in wanted]
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be decoded ({_reason(error)})") from error
    if len(frames) != len(distinct) or len({frame.shape for frame in frames}) > 1:
        raise ClipError(f"{path}: cannot be decoded (frames are lost or change their size within the file)")
    return DecodedClip(
        frames=np.stack(frames),
        positions=positions.reshape(indices.shape),
        indices=indices,
        num_frames_in_file=count,
        decoder=f"PyAV {av.__version__}",
    )


def _pictures(path: str | Path) -> "Iterator[av.VideoFrame]":  # type: ignore[name-defined]  # noqa: F821
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ClipError(f"{path}: cannot be decoded (it has no video stream)")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        yield from container.decode(stream)


def _upright(frame: "av.VideoFrame") -> np.ndarray:  # type: ignore[name-defined]  # noqa: F821
    """uint8 (H, W, 3), turned as the file says it is to be shown, as decord does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # swscale's remarks on unusual colour ranges
        picture: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, k=frame.rotation // 90 % 4))


def _reason(error: BaseException) -> str:
    """The first telling line of a decoder's message; decord's carries a C++ stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.split("] ", 1)[-1][:200]
