"""Decode with torchcodec, which can use a GPU. It is an extra, as its pixels differ from the other decoders'."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evl_cache.errors import ClipError, Outage
from evl_cache.video.frames import Choose, DecodeOptions, FrameEvent, frames_in_pieces, reason_of
from evl_cache.video.packets import Packets
from evl_cache.video.shown import seconds_of

# How it begins where FFmpeg is missing. Newer ones can be imported without, as they decode pictures too, and then say so
# of every file.
_NOT_LOADED = "Could not load libtorchcodec"


def torchcodec_frames(
    path: str | Path, choose: Choose, options: DecodeOptions, packets: Packets
) -> Iterator[FrameEvent]:
    """Yield what `video.decode_frames` yields, decoded by torchcodec on `options.device`.

    Damaged frames that its decoder conceals are not noticed; others are errors.

    Raises: ClipError where it cannot; Outage where the device or torchcodec itself is at fault.
    """
    import torch
    import torchcodec
    from torchcodec.decoders import VideoDecoder

    try:
        reader = VideoDecoder(
            os.path.abspath(path),
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            device=options.device,
            seek_mode="exact",
        )

        def read(numbers: np.ndarray) -> np.ndarray:
            frames: np.ndarray = reader.get_frames_at(numbers.tolist()).data.cpu().numpy()
            return frames

        if len(reader) != len(packets.times):
            raise ClipError(f"{path}: torchcodec counts {len(reader)} frames, {len(packets.times)} are coded")
        yield from frames_in_pieces(
            len(reader),
            choose,
            read,
            seconds=lambda: seconds_of(packets),
            frame_bytes=None,
            decoder=f"torchcodec {torchcodec.__version__} on {options.device}",
        )
    except (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError)) as error:
        raise Outage(
            f"{options.device} cannot decode ({reason_of(error)})",
            remedy="free the GPU, or use fewer --decode-workers",
        ) from error
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        if str(error).startswith(_NOT_LOADED):
            raise Outage(
                "torchcodec finds no FFmpeg that it can use",
                remedy="install FFmpeg's shared libraries, of version 4 to 9, or use --decoder auto",
            ) from error
        raise ClipError(f"{path}: cannot be decoded ({reason_of(error)})") from error
