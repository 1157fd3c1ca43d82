"""Frames by torchcodec, which can decode on a GPU. An extra: its pixels differ from the other decoders'."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video.frames import Choose, DecodeOptions, FrameEvent, frames_in_pieces, reason_of


def torchcodec_frames(path: str | Path, choose: Choose, options: DecodeOptions) -> Iterator[FrameEvent]:
    """As `video.decode_frames`, by torchcodec on `options.device`.

    It tells of a damaged frame by an error or not at all: what its decoder conceals is not noticed.
    """
    import torchcodec
    from torchcodec.decoders import VideoDecoder

    try:
        reader = VideoDecoder(
            str(path), dimension_order="NHWC", num_ffmpeg_threads=1, device=options.device, seek_mode="exact"
        )

        def read(numbers: np.ndarray) -> np.ndarray:
            frames: np.ndarray = reader.get_frames_at(numbers.tolist()).data.cpu().numpy()
            return frames

        yield from frames_in_pieces(
            len(reader),
            choose,
            read,
            frame_bytes=None,
            decoder=f"torchcodec {torchcodec.__version__} on {options.device}",
        )
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise ClipError(f"{path}: cannot be decoded ({reason_of(error)})") from error
