"""A stream decoded from its start, with what FFmpeg says of each packet."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evl_cache.video import h264
from evl_cache.video.coded import LEAST_PICTURE_NBYTES, NEVER_CODED
from evl_cache.video.packets import demuxed
from evl_cache.video.pyav_messages import Listener

if TYPE_CHECKING:
    import av
    from av.bitstream import BitStreamFilterContext

# Units that hold pictures, or that their decoding needs; the others are notes beside the pictures.
PICTURE_UNITS = {"h264": "1-5|7|8|13-15|19-21", "hevc": "0-34"}
_OF_MEMORY = re.compile(r"get_buffer|allocat")
_LEAST_PICTURE_NBYTES, _MOST_NOTE_NBYTES = 16, 256  # of a packet with a picture, and of one without
# Packets between one that the container calls damaged, and where the next stream begins.
_MOST_AFTER_A_JOINT = 2


@dataclass(frozen=True)
class Complaint:
    """What FFmpeg said, and the number of the packet that it is laid to. is_lasting: pictures may be lost by it."""

    packet: int
    text: str
    is_lasting: bool = False


@dataclass(frozen=True, eq=False)
class _Tag:
    """The number of a packet. PyAV knows such objects by their address, so each is used once, and kept alive."""

    number: int


class Decoding(Iterator["av.VideoFrame"]):
    """The frames of a stream, each with the number of its packet as `opaque`, and what is said meanwhile.

    Attributes:
        packet: number of the last packet.
        keys: numbers of the packets so far that need nothing before them.
        first_key: number of the first packet that the container calls a key frame.
        stamps: when the picture of each packet is shown, or decoded where that is all that is said; None where neither is.
        unshown: numbers of packets that need not give a picture.
        has_stand_ins: whether some packets are too small for a picture: beside them, others may hold two.
        recovery_points: key frames after which others may be shown that need what is before them.
        complaints: so far.
    """

    def __init__(
        self,
        container: "av.container.InputContainer",
        stream: "av.VideoStream",
        listener: Listener,
        *,
        without_notes: bool,
    ) -> None:
        self.packet = -1
        self.keys: list[int] = []
        self.first_key: int | None = None
        self.stamps: list[int | None] = []
        self.unshown: set[int] = set()
        self.has_stand_ins = False
        self.recovery_points: set[int] = set()
        self.complaints: list[Complaint] = []
        self._container, self._stream, self._listener = container, stream, listener
        self._codec = stream.codec_context.codec.canonical_name
        self._filter = _note_filter(stream) if without_notes else None
        self._tags: list[_Tag] = []
        self._whole: set[int] = set()  # packets that the container, but nothing else, calls damaged
        self._broken: int | None = None  # the last packet of that kind, until the next one shows what it was
        stream.codec_context.copy_opaque = True
        listener.attend(container, stream)
        self._said_before = [] if without_notes else listener.take()  # when the file was opened, of its start
        self._frames = self._all()

    def __next__(self) -> "av.VideoFrame":
        return next(self._frames)

    def _all(self) -> Iterator["av.VideoFrame"]:
        for packet in demuxed(self._container, self._stream):
            said = self._listener.take()
            if packet.size:
                self.packet += 1
                self.stamps.append(packet.dts if packet.pts is None else packet.pts)
                self._look(packet)
            for complaint in said:
                is_lasting = complaint.is_of(self._container)
                if is_lasting or self._filter is None:  # else a parser's, which sees the notes
                    self.complaints.append(Complaint(self.packet, complaint.text, is_lasting))
            frames = self._decoded(packet)
            for frame in frames:
                number = self.packet_of(frame)
                if frame.is_corrupt and number not in self._whole:
                    self.complaints.append(Complaint(number, "one is concealed in part"))
            yield from frames
        if self._broken is not None:
            self.complaints.append(Complaint(self._broken, "its last frame is cut off"))
        if not self.complaints:  # else the same was said again
            self.complaints += [Complaint(0, said.text) for said in self._said_before]

    def packet_of(self, frame: "av.VideoFrame") -> int:
        """The number of a frame's packet; of the last one, where a decoder does not say."""
        tag = frame.opaque
        return tag.number if isinstance(tag, _Tag) else self.packet

    def _tag(self) -> "_Tag":
        self._tags.append(_Tag(self.packet))
        return self._tags[-1]

    def _look(self, packet: "av.Packet[av.VideoStream]") -> None:
        """Note what kind of packet it is."""
        self.has_stand_ins |= self._codec.startswith(NEVER_CODED) and packet.size < LEAST_PICTURE_NBYTES
        if packet.is_discard or (packet.size < _MOST_NOTE_NBYTES and not self._holds_picture(packet)):
            self.unshown.add(self.packet)
        if packet.is_keyframe:
            if self.first_key is None:
                self.first_key = self.packet
            self._look_at_key(packet)
        if self._broken is not None and self.packet - self._broken >= _MOST_AFTER_A_JOINT:
            self.complaints.append(Complaint(self._broken, "a frame is cut off"))
            self._broken = None

    def _holds_picture(self, packet: "av.Packet[av.VideoStream]") -> bool:
        """Whether a small packet is more than a note beside the pictures, or a sign that one is shown again."""
        if self._codec == "h264":
            return h264.has_slice(bytes(packet), self._stream.codec_context.extradata)
        return packet.size >= _LEAST_PICTURE_NBYTES

    def _look_at_key(self, packet: "av.Packet[av.VideoStream]") -> None:
        data, extradata = bytes(packet), self._stream.codec_context.extradata
        is_idr = self._codec != "h264" or h264.has_idr(data, extradata)
        if is_idr or h264.begins_anew(data, extradata):
            self.keys.append(self.packet)
            self._broken = None  # two streams were joined there: nothing is missing
        if not is_idr:
            self.recovery_points.add(self.packet)

    def _decoded(self, packet: "av.Packet[av.VideoStream]") -> "list[av.VideoFrame]":
        import av

        frames: list[av.VideoFrame] = []
        is_lost = False
        try:
            for part in self._filter.filter(packet) if self._filter is not None and packet.size else [packet]:
                part.opaque = self._tag()
                frames += self._stream.codec_context.decode(part)
        except MemoryError:
            raise
        except av.FFmpegError:
            is_lost = True
            _check_memory(self._stream.width * self._stream.height)
        said = [complaint.text for complaint in self._listener.take() if not complaint.is_of(self._container)]
        if any(_OF_MEMORY.search(text) for text in said):
            raise MemoryError
        if is_lost or said:
            text = said[0] if said else "one cannot be decoded"
            self.complaints.append(Complaint(self.packet, text, is_lasting=is_lost))
        elif packet.is_corrupt:
            self._whole.add(self.packet)
            self._broken = self.packet
        return frames


def _check_memory(pixels: int) -> None:
    """Raises: MemoryError where there is none for a frame: FFmpeg says only that it cannot decode one."""
    bytearray(4 * pixels)


def _note_filter(stream: "av.VideoStream") -> "BitStreamFilterContext":
    from av.bitstream import BitStreamFilterContext

    units = PICTURE_UNITS[stream.codec_context.codec.canonical_name]
    return BitStreamFilterContext(f"filter_units=pass_types={units}", stream)
