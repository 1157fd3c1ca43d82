"""What a decoder is asked for and what it returns.

T frames asked for, H and W source pixels.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from evl_cache.errors import UsageError
from evl_cache.spec import DECODERS, SOFTWARE_PIXELS
from evl_cache.video.which_decord import has_decord

# Frames are passed on in pieces of about this size, so that memory does not grow with their number.
PIECE_BYTES = 8 << 20

_UNREADABLE = "Error reading "  # how decord begins where FFmpeg cannot open a file; the name follows
_TIME_OF_DAY = re.compile(r"\[\d\d:\d\d:\d\d\] ")  # in decord's messages: a record must not depend on it


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a choice by time is told of a file.

    Attributes:
        seconds: when each frame is shown, since the first one is; float64 (frames in the file,), ascending.
    """

    seconds: np.ndarray

    @property
    def count(self) -> int:
        """Frames in the file."""
        return len(self.seconds)


@dataclass(frozen=True)
class ByTime:
    """A choice that has to know when frames are shown. Others are not told: an hour of times is megabytes."""

    of: Callable[[Shown], np.ndarray]


Choose = Callable[[int], np.ndarray] | ByTime


def chosen(choose: Choose, count: int, seconds: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the frames that are wanted of a file, int64 (views, T).

    Args:
        choose: as `decode_frames` takes it.
        count: frames in the file.
        seconds: returns when each is shown, as `Shown` has it; called where the choice asks for it.

    Raises: ClipError as the choice, or `seconds`, does.
    """
    return choose.of(Shown(seconds=seconds())) if isinstance(choose, ByTime) else choose(count)


@dataclass(frozen=True, kw_only=True)
class ClipHeader:
    """What is known of a clip before its frames come.

    Attributes:
        indices: frame numbers in the file, int64 (views, T).
        num_frames_in_file: as the decoder counts them.
        frame_size: (H, W), upright.
        decoder: library that decodes, with its version.
    """

    indices: np.ndarray
    num_frames_in_file: int
    frame_size: tuple[int, int]
    decoder: str

    @property
    def distinct(self) -> np.ndarray:
        """The different frame numbers in the order in which their frames come, int64."""
        return np.unique(self.indices)

    @property
    def positions(self) -> np.ndarray:
        """Each view's frames as positions among the distinct ones, int64 (views, T)."""
        return np.unique(self.indices, return_inverse=True)[1].reshape(self.indices.shape)


# A header, then pieces of the distinct frames, uint8 (some, H, W, 3), RGB, at source resolution. Another header starts
# again: the decoder before it gave up, and its frames must be dropped.
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
        """Return the frames of one temporal view, uint8 (T, H, W, 3); no copy where they are all frames in order."""
        positions = self.header.positions[number]
        if np.array_equal(positions, np.arange(len(self.frames))):
            return self.frames
        frames: np.ndarray = self.frames[positions]
        return frames


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How clips are decoded.

    Attributes:
        decoder: `auto` and `pyav` are PyAV; `decord` is PyAV too for files of which it is not proved that decord serves the
            same frames and pixels; `torchcodec`, whose pixels are its own, refuses files whose frames it may mistake.
        tolerate_bad_frames: whether to take what a decoder puts in place of damaged frames, instead of failing the clip.
        device: where torchcodec decodes; the others use the CPU.

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
                "decoder 'decord' is not installed; pip install decord2 (or decord, its predecessor; where one of them "
                "was there before, first pip uninstall decord decord2), or use --decoder auto"
            )
        if self.decoder == "torchcodec" and importlib.util.find_spec("torchcodec") is None:
            raise UsageError(
                "decoder 'torchcodec' is not installed; pip install 'evl-cache[torchcodec]' (it needs FFmpeg's shared "
                "libraries, and for a GPU a build for its CUDA version), or use --decoder auto"
            )

    @property
    def pixels(self) -> str:
        """The name for `CacheSpec.pixels`: one for decord and PyAV, which agree; one for each kind of torchcodec's devices."""
        return f"torchcodec-{self.device.split(':')[0]}" if self.decoder == "torchcodec" else SOFTWARE_PIXELS


def frames_in_pieces(
    count: int,
    choose: Choose,
    read: Callable[[np.ndarray], np.ndarray],
    *,
    seconds: Callable[[], np.ndarray],
    frame_bytes: int | None,
    decoder: str,
) -> Iterator[FrameEvent]:
    """Yield the header and the chosen frames of a file.

    Args:
        count: frames in the file.
        choose: as `decode_frames` takes it.
        read: returns frames by their numbers, uint8 (some, H, W, 3).
        seconds: as `chosen` takes it.
        frame_bytes: bytes of one frame; None where they are not known before the first.
        decoder: library that decodes, with its version.
    """
    indices = chosen(choose, count, seconds)
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


def reason_of(error: BaseException) -> str:
    """Return what a decoder says, without the name of the file, which whoever asks for it knows.

    Of decord it is the first line that says something, as a C++ stack trace follows.
    """
    said = str(error)
    if strerror := getattr(error, "strerror", None):  # FFmpeg's errors and the system's end with the name
        log = getattr(error, "log", None)
        said = f"{strerror}; {log[2].strip()}" if log else str(strerror)
    elif said.startswith(_UNREADABLE):
        said = "no video can be read from it"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return _TIME_OF_DAY.sub("", text.split("] ", 1)[-1][:200])
