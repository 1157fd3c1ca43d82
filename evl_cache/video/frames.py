"""What a decoder is asked for, and what it gives.

T frames asked for, H and W source pixels.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from evl_cache.errors import UsageError
from evl_cache.spec import SOFTWARE_PIXELS

DECODERS = ("auto", "decord", "pyav", "torchcodec")
# Frames are handed on a few at a time, so that a large picture is not held as often as it is asked for.
PIECE_BYTES = 8 << 20

Choose = Callable[[int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ClipHeader:
    """Which frames of a file are to come.

    Attributes:
        indices: int64 (views, T): frame numbers in the file.
        num_frames_in_file: as the decoder counts them.
        frame_size: (H, W), upright.
        decoder: which library serves, with its version.
    """

    indices: np.ndarray
    num_frames_in_file: int
    frame_size: tuple[int, int]
    decoder: str

    @property
    def distinct(self) -> np.ndarray:
        """int64: frame numbers in the order in which the frames come, each once."""
        return np.unique(self.indices)

    @property
    def positions(self) -> np.ndarray:
        """int64 (views, T): which of the distinct frames each frame of each view is."""
        return np.unique(self.indices, return_inverse=True)[1].reshape(self.indices.shape)


# A header, then the distinct frames as uint8 (some, H, W, 3), RGB, at source resolution. Another header begins anew:
# the decoder before it gave up, and what it gave does not count.
FrameEvent = ClipHeader | np.ndarray


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """All frames of one clip and where they came from.

    Attributes:
        header: which frames they are.
        frames: uint8 (distinct frames, H, W, 3), RGB, at source resolution, in the order of the file.
    """

    header: ClipHeader
    frames: np.ndarray

    def view(self, number: int) -> np.ndarray:
        """Frames of one temporal view, uint8 (T, H, W, 3): not a copy where the view is all frames, in their order."""
        positions = self.header.positions[number]
        if np.array_equal(positions, np.arange(len(self.frames))):
            return self.frames
        frames: np.ndarray = self.frames[positions]
        return frames


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How clips are decoded.

    Attributes:
        decoder: `decord`, `pyav`, `torchcodec`, or `auto`: decord, and PyAV where decord is not installed, cannot read
            the file, complains of it, is known to overlook damage (HEVC), or would keep it in memory (large videos).
        tolerate_bad_frames: take what a decoder puts in the place of damaged frames, instead of failing the clip.
        device: on which torchcodec decodes; the others use the processor.

    Raises: UsageError for an unknown decoder, or one that is not installed.
    """

    decoder: str = "auto"
    tolerate_bad_frames: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise UsageError(f"decoder {self.decoder!r}; expected one of {', '.join(DECODERS)}")
        if self.decoder == "decord" and not has_decord():
            raise UsageError(
                "decoder 'decord' is not installed (it exists for Linux on x86-64 and Windows); use --decoder pyav"
            )
        if self.decoder == "torchcodec" and importlib.util.find_spec("torchcodec") is None:
            raise UsageError(
                "decoder 'torchcodec' is not installed; pip install 'evl-cache[torchcodec]' (it needs FFmpeg's shared "
                "libraries, and for a GPU a build for its CUDA version), or use --decoder auto"
            )

    @property
    def pixels(self) -> str:
        """`CacheSpec.pixels`: decord and PyAV agree; torchcodec differs, also from device to device."""
        return f"torchcodec-{self.device.split(':')[0]}" if self.decoder == "torchcodec" else SOFTWARE_PIXELS


def frames_in_pieces(
    count: int,
    choose: Choose,
    read: Callable[[np.ndarray], np.ndarray],
    *,
    frame_bytes: int | None,
    decoder: str,
) -> Iterator[FrameEvent]:
    """The frames chosen of a file with `count` of them.

    Args:
        read: gives uint8 (some, H, W, 3) by frame number. frame_bytes: of one, where it is known.
    """
    indices = choose(count)
    distinct = np.unique(indices)
    done = 0
    while done < len(distinct):
        rows = max(1, PIECE_BYTES // frame_bytes) if frame_bytes else 1
        frames = read(distinct[done : done + rows])
        if done == 0:
            height, width = frames.shape[1:3]
            frame_bytes = frames[0].nbytes
            yield ClipHeader(
                indices=indices, num_frames_in_file=count, frame_size=(height, width), decoder=decoder
            )
        yield frames
        done += len(frames)


def has_decord() -> bool:
    """Whether decord is installed: it is not for every platform."""
    return importlib.util.find_spec("decord") is not None


def reason_of(error: BaseException) -> str:
    """The first telling line of a decoder's message; decord's carries a C++ stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.split("] ", 1)[-1][:200]
