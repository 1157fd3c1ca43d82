"""What the packets of a file say of its frames, without a picture decoded. H and W source pixels.

A decoder that seeks counts on from where it lands, and may serve other frames than it was asked for. The packets of most
files prove that this cannot happen; all other files are decoded from their start.
"""

import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from evl_cache.errors import ClipError
from evl_cache.video import h264
from evl_cache.video.coded import LEAST_PICTURE_NBYTES, NEVER_CODED, is_key
from evl_cache.video.orientation import display_matrix, is_plain_turn
from evl_cache.video.pixels import MISCOPIED_WIDTHS, OLD_MISCOPIED_WIDTHS, decord_converts_alike
from evl_cache.video.pyav_messages import listening

if TYPE_CHECKING:
    import av

# Containers that give pictures their times, and whose key frames are found exactly.
_TIMED = ("mov", "matroska")
_MIRRORED = "it is mirrored, or turned by no right angle"
# Their headers say how long the longest stream is; those of others are believed of files with one stream only.
_DECLARED = ("flv", "matroska")
_LEAST_LOSS_S, _LEAST_LOSS = 0.3, 0.05  # seconds, and share of the length; less may be rounding


@dataclass(frozen=True, kw_only=True)
class Packets:
    """What a file's packets say of its frames.

    Attributes:
        count: of packets whose pictures are shown, if each is a picture.
        times: of the frames that are shown, ascending, in the stream's units; empty where `unproved` is set.
        keys: of key frames, likewise.
        stamps: of the packets whose pictures are shown, in their order: when each is shown, or decoded where that is all
            that is said; one is missing for each packet that says neither.
        tick_s: the stream's unit of time in seconds.
        rate: pictures a second, as the container says; None where it does not.
        unproved: why a decoder that seeks may serve other frames than it is asked for; None where it cannot.
        has_hidden: whether an edit list hides frames: then a decoder that counts packets is wrong, and one that looks
            at times is not.
        lost: what shows that data of the file are missing, so that frames after them have other numbers; None where
            nothing does.
        only_pyav: why another decoder may give other pixels; None where they are the same.
        only_pyav_or_decord2: why decord 0.6 may, which served caches before decord2 did; None where it did not.
        is_mirrored: whether its pictures are mirrored, or turned by no right angle.
        codec: FFmpeg's name of it.
        frame_bytes: bytes of a frame as RGB.
    """

    count: int = 0
    times: Sequence[int] = ()
    keys: Sequence[int] = ()
    stamps: Sequence[int] = ()
    tick_s: Fraction = Fraction(1)
    rate: Fraction | None = None
    unproved: str | None = None
    has_hidden: bool = False
    lost: str | None = None
    only_pyav: str | None = None
    only_pyav_or_decord2: str | None = None
    is_mirrored: bool = False
    codec: str
    frame_bytes: int

    def number_of(self, time: int | None) -> int | None:
        """Return the number of the frame that is shown at a time; None where there is none."""
        if time is None:
            return None
        number = bisect_left(self.times, time)
        return number if number < len(self.times) and self.times[number] == time else None

    def key_before(self, time: int) -> int:
        """Return the time of the key frame from which decoding reaches `time`."""
        return self.keys[bisect_right(self.keys, time) - 1]


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """Open a file, and the one of its video streams that is shown: FFmpeg's best, but never a cover.

    Raises: ClipError where there is none, or no decoder for it; FFmpegError and OSError as PyAV does.
    """
    import av
    from av.stream import Discard

    # With its directories: FFmpeg takes a name such as `http:x.mp4` for an address. And a picture called `%d.jpg` is one
    # picture, not those called 1.jpg, 2.jpg, ... beside it. Titles and tags may be of any bytes.
    with av.open(
        os.path.abspath(path), options={"pattern_type": "none"}, metadata_errors="replace"
    ) as container:
        stream = _shown(path, container)
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        stream.codec_context.thread_count = 1  # only then complaints come with the packet that they concern
        yield container, stream


def demuxed(
    container: "av.container.InputContainer", stream: "av.VideoStream"
) -> Iterator["av.Packet[av.VideoStream]"]:
    """Yield a stream's packets, and an empty one at the end. Raises: as PyAV does, and OSError for streams that begin later."""
    try:
        yield from _demux(container, stream)
    except IndexError as error:  # PyAV knows only those that were there when it opened the file
        raise OSError("another stream begins within it: copy its video alone with ffmpeg -c copy") from error


def _demux(
    container: "av.container.InputContainer", stream: "av.VideoStream"
) -> Iterator["av.Packet[av.VideoStream]"]:
    return container.demux(stream)


def _shown(path: str | Path, container: "av.container.InputContainer") -> "av.VideoStream":
    from av.stream import Disposition

    videos = container.streams.video
    films = [video for video in videos if not video.disposition & Disposition.attached_pic]
    decoded = [video for video in films if video.codec_context is not None]  # type: ignore[redundant-expr]
    if not films:
        only = ", only a cover" if videos else ""
        raise ClipError(f"{path}: cannot be decoded (it has no video stream{only})")
    if not decoded:
        raise ClipError(f"{path}: cannot be decoded (no decoder for its video stream)")
    best = container.streams.best("video")
    return best if best in decoded else max(decoded, key=lambda film: film.width * film.height)


def is_first_stream(path: str | Path) -> bool:
    """Return whether a file's best video stream is also its first."""
    with open_video(path) as (container, stream):
        return stream.index == container.streams.video[0].index


def read_packets(path: str | Path) -> Packets:
    """Read all packets of a file's video.

    Raises: ClipError where there is no video; FFmpegError and OSError as PyAV does.
    """
    with listening() as listener, open_video(path) as (container, stream):
        listener.attend(container, stream)
        reading = _Reading(path, container, stream)
        for packet in demuxed(container, stream):  # none is kept: an hour of them would fill the memory
            if packet.size:
                reading.add(packet)
        lost = next((said.text for said in listener.take() if said.is_of(container)), None)
        missing_s = reading.missing_s()
        if lost is None and reading.is_short_riff():
            lost = "its end is missing"
        if lost is None and missing_s is not None and (shown := _loss(path, reading, missing_s)):
            lost = f"{missing_s:.2f} s are missing of what it says that it lasts, and {shown}"
        found = reading.summary()
    return found if lost is None else replace(found, lost=lost, unproved="data of it are missing")


class _Reading:
    """Adds up the packets of one stream."""

    def __init__(
        self, path: str | Path, container: "av.container.InputContainer", stream: "av.VideoStream"
    ) -> None:
        self._path, self._container, self._stream = path, container, stream
        self._codec = stream.codec_context.codec.canonical_name
        self._times, self._keys, self._stamps = array("q"), array("q"), array("q")
        self._doubt: str | None = None
        self._has_hidden = self._changes_pictures = False
        self._is_in_order = True  # whether each frame is shown after those before it in the file
        self._count = 0
        self._start: int | None = None
        self._last: int | None = None
        self._end = 0
        self.nbytes = 0
        self.ends_corrupt = False
        if not container.format.name.startswith(_TIMED):
            self._doubt = f"{container.format.long_name} does not say when each frame is shown"

    def add(self, packet: "av.Packet[av.VideoStream]") -> None:
        """Take the next packet."""
        self._count += not packet.is_discard
        self.nbytes += packet.size
        self.ends_corrupt = packet.is_corrupt
        time = packet.pts
        if self._doubt is None:
            self._doubt = self._why_not(packet)
        if (coded := packet.dts if time is None else time) is not None:
            self._start = coded if self._start is None else min(self._start, coded)
            self._end = max(self._end, coded + (packet.duration or 0))
            if not packet.is_discard:
                self._stamps.append(coded)
        if time is None:
            return
        self._is_in_order &= self._last is None or time > self._last
        self._last = time
        if packet.is_keyframe:
            self._keys.append(time)
        if packet.is_discard:
            self._has_hidden = True
        else:
            self._times.append(time)

    def _why_not(self, packet: "av.Packet[av.VideoStream]") -> str | None:
        if packet.pts is None:
            return "some of its frames have no time"
        if packet.is_corrupt:
            return "some of its data are damaged"
        if not packet.is_keyframe:
            if not self._keys:
                return "it does not begin with a key frame"
            if packet.pts < self._keys[-1]:
                return "frames that come after a key frame are shown before it"
        elif self._codec == "h264":
            data, extradata = bytes(packet), self._stream.codec_context.extradata
            if not h264.has_idr(data, extradata):
                return "frames from before a key frame are needed after it"
            if h264.turns_pictures(data, extradata):
                return "its pictures are turned within the stream"
            self._changes_pictures |= h264.changes_pictures(data, extradata)
        elif not is_key(self._codec, bytes(packet)):
            return "it calls frames key frames that are none"
        if self._codec.startswith(NEVER_CODED) and packet.size < LEAST_PICTURE_NBYTES:
            return "some of its frames were never coded"
        if self._codec == "vp8" and not bytes(packet)[0] & 0x10:
            return "some of its pictures are not to be shown"
        return None

    @property
    def _has_matrix(self) -> bool:
        return "Display Matrix" in self._container.dumps_format()  # type: ignore[attr-defined]

    def _is_mirrored(self) -> bool:
        """Whether pictures are shown otherwise than turned by right angles, which decord does as well."""
        if not self._has_matrix:
            return False
        with open_video(self._path) as (container, stream):
            first = next(container.decode(stream), None)
            return first is None or not is_plain_turn(display_matrix(first))

    def _other_pixels(self, miscopied: Set[int]) -> str | None:
        coded = self._stream.codec_context
        if self._has_matrix and not self._container.format.name.startswith("mov"):
            return "decord does not turn files of its kind"
        if any(
            name.lower() == "rotate" for name in self._stream.metadata
        ):  # FFmpeg does not follow it any more
            return "decord turns it by a tag that others ignore"
        if len(self._container.streams.video) > 1:
            return "it has several video streams"
        if not decord_converts_alike(coded, miscopied=miscopied):
            return f"its colours or sizes ({coded.pix_fmt}, {coded.width} x {coded.height}) are converted in several ways"
        if self._changes_pictures or (self._codec == "h264" and not h264.is_progressive(coded.extradata)):
            return "it may be interlaced"
        return None

    def missing_s(self) -> float | None:
        """Return by how many seconds the packets fall short of what the container says; None where it is no more than usual."""
        stream, container = self._stream, self._container
        if stream.duration is not None and stream.time_base is not None:
            declared_s = float(stream.duration * stream.time_base)
        elif container.duration is not None and (
            len(container.streams) == 1 or container.format.name.startswith(_DECLARED)
        ):
            declared_s = container.duration / 1e6
        else:
            return None
        # A length may count from the first frame, or from time 0.
        length_s = float((self._end - min(self._start or 0, 0)) * (stream.time_base or 0))
        missing_s = declared_s - length_s
        return missing_s if missing_s > _LEAST_LOSS_S + _LEAST_LOSS * declared_s else None

    def is_short_riff(self) -> bool:
        """Whether an AVI file is shorter than it says, and frames that it counts are not in it.

        Its stream's duration does not tell: FFmpeg shortens it by the size of such a file.
        """
        with open(self._path, "rb") as file:
            start = file.read(8)
        is_cut = os.path.getsize(self._path) < 8 + int.from_bytes(start[4:], "little")
        # Times count frames, those that were dropped as well; an index that was never written is no loss.
        return start[:4] == b"RIFF" and is_cut and self._end < self._stream.frames

    def nbytes_of(self, seconds: float) -> float:
        """Return how many bytes so long a part of the film has."""
        length_s = float((self._end - (self._start or 0)) * (self._stream.time_base or 0))
        return self.nbytes / length_s * seconds if length_s > 0 else float(self.nbytes)

    def summary(self) -> Packets:
        """Return what the packets say."""
        coded, is_mirrored = self._stream.codec_context, self._is_mirrored()
        times, keys = sorted(self._times), sorted(self._keys)
        doubt = self._doubt
        if doubt is None and (not times or keys[0] > times[0]):
            doubt = "it does not begin with a key frame"
        if doubt is None and len(set(times)) < len(times):
            doubt = "several of its frames have the same time"
        # Some muxers leave out when frames are shown; then they seem to be shown in the order in which they are decoded.
        if doubt is None and len(times) > 1 and self._is_in_order and coded.has_b_frames:
            doubt = "its times may be those at which frames are decoded"
        if doubt is None and sum(entry.is_keyframe for entry in self._stream.index_entries) > len(keys):
            doubt = "its index calls frames key frames that are none"
        only_pyav = _MIRRORED if is_mirrored else self._other_pixels(MISCOPIED_WIDTHS)
        only_pyav_or_decord2 = only_pyav
        if only_pyav is not None and not is_mirrored:  # of fewer widths
            only_pyav_or_decord2 = self._other_pixels(OLD_MISCOPIED_WIDTHS)
        return Packets(
            count=self._count,
            times=() if doubt else times,
            keys=() if doubt else keys,
            stamps=self._stamps,
            tick_s=self._stream.time_base or Fraction(1),
            rate=self._stream.average_rate or self._stream.guessed_rate,
            unproved=doubt,
            has_hidden=self._has_hidden,
            only_pyav=only_pyav,
            only_pyav_or_decord2=only_pyav_or_decord2,
            is_mirrored=is_mirrored,
            codec=self._codec,
            frame_bytes=3 * coded.width * coded.height,
        )


def _loss(path: str | Path, reading: _Reading, missing_s: float) -> str | None:
    """Return what shows that a file which says that it is longer has lost frames; None where only its header lies."""
    if reading.ends_corrupt:
        return "its last frame is cut off"
    nbytes = os.path.getsize(path)
    if nbytes - _nbytes_of_packets(path) > min(nbytes, reading.nbytes_of(missing_s)) / 2:
        return "parts of it cannot be read"
    return None


def _nbytes_of_packets(path: str | Path) -> int:
    """Return the size of all packets of all streams."""
    import av

    with av.open(os.path.abspath(path), metadata_errors="replace") as container:
        return sum(packet.size for packet in container.demux())
