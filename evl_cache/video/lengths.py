"""How long a video is by its container's header, without its packets read or a picture decoded."""

from pathlib import Path
from typing import NamedTuple

from evl_cache.errors import ClipError
from evl_cache.video.frames import reason_of
from evl_cache.video.packets import open_video
from evl_cache.video.pyav_messages import listening


class Length(NamedTuple):
    """What a header says of a video's best stream: it may err by a few frames, and by more in a damaged file.

    Attributes:
        frames: as the header counts them, or duration times rate.
        rate: frames a second; None where it says none.
    """

    frames: int
    rate: float | None


def told_length(path: str | Path) -> Length:
    """Return how long a file says that it is. Raises: ClipError where it cannot be opened, or does not say."""
    import av

    try:
        with listening(), open_video(path) as (container, stream):
            rate = float(stream.average_rate) if stream.average_rate else None
            frames = stream.frames
            if frames < 1 and rate is not None:
                if stream.duration is not None and stream.time_base is not None:
                    frames = round(float(stream.duration * stream.time_base) * rate)
                elif container.duration is not None:
                    frames = round(container.duration / av.time_base * rate)
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be opened ({reason_of(error)})") from error
    if frames < 1:
        raise ClipError(f"{path}: its header does not say how long it is")
    return Length(frames, rate)
