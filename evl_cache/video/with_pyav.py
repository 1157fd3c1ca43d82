"""Decode with PyAV from the key frames before the frames that are wanted. T frames asked for, H and W source pixels."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evl_cache.video.frames import Choose, FrameEvent, chosen
from evl_cache.video.linear import HEARD_LATE
from evl_cache.video.orientation import display_matrix
from evl_cache.video.packets import Packets, open_video
from evl_cache.video.pictures import picture_of, with_header
from evl_cache.video.pyav_messages import Listener, listening
from evl_cache.video.shown import seconds_of

if TYPE_CHECKING:
    import av


class Unsure(Exception):
    """Something is not as the packets say, or a decoder complained: only a decode from the start can tell."""


def seek_frames(path: str | Path, choose: Choose, packets: Packets) -> Iterator[FrameEvent]:
    """Yield what `video.decode_frames` yields of a file whose packets prove when each frame is shown.

    Raises: Unsure where frames that were yielded may be damaged, or others; FFmpegError and OSError as PyAV does.
    """
    with listening() as listener, open_video(path) as (container, stream):
        listener.attend(container, stream)
        indices = chosen(choose, len(packets.times), lambda: seconds_of(packets))
        wanted = [packets.times[number] for number in np.unique(indices).tolist()]
        frames = _frames_at(wanted, packets, container, stream, listener)
        pictures = (picture_of(path, frame, display_matrix(frame)) for frame in frames)
        yield from with_header(path, pictures, indices, len(packets.times))


def _frames_at(
    wanted: list[int],
    packets: Packets,
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    listener: Listener,
) -> Iterator["av.VideoFrame"]:
    coded = stream.codec_context
    of_run: Iterator[av.Packet[av.VideoStream]] = iter(())
    lands = False  # whether the next frame is the first after a seek
    at: int | None = None  # time of the last frame decoded
    decoding: Iterator[av.VideoFrame] = iter(())
    for time in wanted:
        key = packets.key_before(time)
        if at is None or key > at:
            _hear_out(of_run, coded, listener)
            container.seek(key, stream=stream, backward=True)
            of_run, lands = container.demux(stream), True
            decoding = _decode(of_run, coded, wanted=frozenset(wanted))
        found: av.VideoFrame | None = None
        for frame in decoding:
            if lands and not frame.key_frame:  # whatever the container calls it
                raise Unsure
            if not lands and at is not None and (frame.pts is None or frame.pts <= at):
                raise Unsure  # packets do not say when frames are shown
            at, lands = frame.pts, False
            if frame.is_corrupt and (at is None or at >= key):
                raise Unsure
            if at is None or at >= time:
                found = frame
                break
        if found is None or at != time or listener.take():
            raise Unsure
        yield found
    _hear_out(of_run, coded, listener)


def _decode(
    packets: "Iterator[av.Packet[av.VideoStream]]", coded: "av.VideoCodecContext", *, wanted: frozenset[int]
) -> Iterator["av.VideoFrame"]:
    """Yield frames from here on; of H.264 without those that are neither wanted nor needed to decode others.

    Only H.264 marks pictures that no other picture refers to (nal_ref_idc 0); with B-frames every second one is such.
    """
    may_skip = coded.name == "h264"
    for packet in packets:
        if may_skip:
            is_wanted = not packet.size or packet.pts in wanted
            coded.skip_frame = "DEFAULT" if is_wanted else "NONREF"
        yield from _decoded(packet)


def _decoded(packet: "av.Packet[av.VideoStream]") -> "list[av.VideoFrame]":
    import av

    try:
        return packet.decode()
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise Unsure from error


def _hear_out(
    packets: "Iterator[av.Packet[av.VideoStream]]", coded: "av.VideoCodecContext", listener: Listener
) -> None:
    """Decode some packets more, but for the next key frame: of damage a decoder may speak late. Raises: Unsure where it does."""
    if coded.name == "h264":
        coded.skip_frame = "NONREF"
    for packet in islice(packets, HEARD_LATE):
        if not packet.size or packet.is_keyframe:
            break
        if any(frame.is_corrupt for frame in _decoded(packet)):
            raise Unsure
    if listener.take():
        raise Unsure
