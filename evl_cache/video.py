"""Frames out of video files. The only module that knows decord.

T frames asked for, H and W source pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch  # noqa: F401  torch must be imported before decord: their bundled libraries clash otherwise

from evl_cache.errors import ClipError


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


def decode_clip(path: str | Path, choose: Callable[[int], np.ndarray]) -> DecodedClip:
    """Decode only the frames that `choose(num_frames_in_file) -> (views, T)` asks for, each once.

    Raises: ClipError with the reason where the file cannot be read.
    """
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


def _reason(error: Exception) -> str:
    """The first telling line of decord's message, which carries a C++ stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.split("] ", 1)[-1][:200]
