"""Decode a file from its start: slow, and right for every file. T frames asked for, H and W source pixels.

It judges damage by pictures. What FFmpeg complains of is laid to the packet that it was given; from that one on, pictures
count as damaged until a key frame that needs nothing before it. So a clip is refused for the frames that it wants,
whatever is wrong with others, and whoever else tried to decode it.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video.decoding import PICTURE_UNITS, Complaint, Decoding
from evl_cache.video.frames import ByTime, Choose, DecodeOptions, FrameEvent, chosen
from evl_cache.video.orientation import Matrix, display_matrix
from evl_cache.video.packets import Packets, open_video
from evl_cache.video.pictures import picture_of, with_header
from evl_cache.video.pyav_messages import listening
from evl_cache.video.shown import seconds_of, seconds_since_first

if TYPE_CHECKING:
    import av

# Frames that are wanted, as far as packets tell, are kept until their number is sure, up to this size; more are decoded twice.
MOST_HELD_BYTES = 64 << 20

# A decoder may notice damage late, so that pictures of some packets before the one it complains of are not believed.
HEARD_LATE = 8
# Of these, none of the packets since the last key frame.
_OVERLOOK_DAMAGE = ("hevc", "av1", "vp8", "vp9")
# Of these each packet gives a picture, two at most give one where pictures are stored as fields.
_SHOW_EACH_PACKET = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
# What FFmpeg's H.264 decoder says where it is told to forget pictures that it does not have.
_OF_REFERENCES = ("mmco:", "illegal short term buffer state")


def linear_frames(
    path: str | Path, choose: Choose, options: DecodeOptions, packets: Packets
) -> Iterator[FrameEvent]:
    """Yield what `video.decode_frames` yields, decoded from the start.

    Args:
        packets: what they say of the frames; where they prove when each is shown, a frame that cannot be decoded keeps
            its number.

    Raises: ClipError where frames that are wanted are damaged, or none can be decoded; FFmpegError and OSError as PyAV
        does.
    """
    guess = _guess(choose, packets)
    film = _decode(path, packets, kept=frozenset(() if guess is None else guess.ravel().tolist()))
    places, are_timed = film.places(packets)
    if not len(film.packets):
        why = film.complaints[0].text if film.complaints else "it shows no frame"
        raise ClipError(f"{path}: cannot be decoded ({why})")
    if guess is not None and len(places) == packets.count and not isinstance(choose, ByTime):
        indices = guess
    else:
        indices = chosen(choose, len(places), lambda: film.seconds(packets, are_timed=are_timed))
    wanted = places[np.unique(indices)]
    if not options.tolerate_bad_frames:
        _check_whole(path, packets, film, wanted, are_timed=are_timed)
    elif (wanted < 0).any():
        raise ClipError(f"{path}: has frames that cannot be decoded")
    pictures = (picture_of(path, frame, film.matrices[place]) for place, frame in _taken(path, film, wanted))
    yield from with_header(path, pictures, indices, len(places))


@dataclass
class _Film:
    """What a decode from the start gave.

    Attributes:
        codec: FFmpeg's name of it.
        packets: for each picture in the order in which they are shown, the number of its packet.
        times: likewise their times, in the stream's units; None where there is none.
        stamps: of all packets, as `Decoding` has them.
        matrices: of the pictures, the display matrix that holds for them.
        called_keys: numbers of the packets that are said to need nothing before them.
        keys: those of which the decoder says so, too.
        recovery_points: those before which others may be needed for pictures that are shown earlier.
        begins_whole: whether nothing was cut away before the first packet, as far as can be told.
        complaints: what FFmpeg said.
        frames: pictures that were kept, by their places.
        has_fields: whether two packets may be one picture.
    """

    codec: str
    packets: list[int] = field(default_factory=list)
    times: list[int | None] = field(default_factory=list)
    stamps: list[int | None] = field(default_factory=list)
    matrices: list[Matrix | None] = field(default_factory=list)
    called_keys: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    recovery_points: set[int] = field(default_factory=set)
    begins_whole: bool = True
    complaints: list[Complaint] = field(default_factory=list)
    frames: "dict[int, av.VideoFrame]" = field(default_factory=dict)
    has_fields: bool = False

    def places(self, packets: Packets) -> tuple[np.ndarray, bool]:
        """The place of each frame number among the pictures, int64, -1 for a frame without; and whether times tell them."""
        in_order = np.arange(len(self.packets))
        if packets.unproved is not None:
            return in_order, False
        places = np.full(len(packets.times), -1)
        for place, time in enumerate(self.times):
            number = packets.number_of(time)
            if number is None:
                return in_order, False
            places[number] = place
        is_strange = bool((np.diff(places[places >= 0]) <= 0).any()) or (
            (places < 0).any() and not self.complaints
        )
        return (in_order, False) if is_strange else (places, True)

    def seconds(self, packets: Packets, *, are_timed: bool) -> np.ndarray:
        """When each frame is shown, as `Shown` has it; are_timed: whether packets' times number them. Raises: ClipError."""
        if are_timed:
            return seconds_of(packets)
        stamps = [time for time in self.times if time is not None]
        if len(stamps) < len(self.times):
            # AVI says only when packets are decoded, in frames. In their order, these are the times of the pictures.
            of_pictures = (self.stamps[packet] for packet in self.packets)
            stamps = sorted(stamp for stamp in of_pictures if stamp is not None)
        return seconds_since_first(packets, stamps, len(self.packets))

    def damaged(self, *, are_timed: bool) -> np.ndarray:
        """Whether each picture is damaged, or decoded with the help of one that is; bool.

        Args:
            are_timed: whether times number the pictures, so that a lost one does not change the numbers of others.
        """
        coded = np.asarray(self.packets, np.int64)
        places = np.arange(len(coded))
        found = np.zeros(len(coded), bool)
        for at, complaint in self._first_of_each():
            began = self.keys[at - 1] if at else 0
            heard_of = began if self.codec in _OVERLOOK_DAMAGE else max(began, complaint.packet - HEARD_LATE)
            touched = coded >= heard_of
            if at < len(self.keys) and (are_timed or not complaint.is_lasting):
                # What is shown before the key frame may need frames from before it.
                key = self.keys[at]
                touched &= ~((coded >= key) & (places >= self.packets.index(key)))
            found |= touched
        return found

    def _first_of_each(self) -> list[tuple[int, Complaint]]:
        """The first serious complaints since each key frame, of either kind, with the number of the next one in `keys`."""
        first: dict[tuple[int, bool], Complaint] = {}
        for complaint in sorted(self._serious(), key=lambda complaint: complaint.packet):
            first.setdefault((bisect_right(self.keys, complaint.packet), complaint.is_lasting), complaint)
        return [(at, complaint) for (at, _), complaint in first.items()]

    def _serious(self) -> list[Complaint]:
        """The complaints, but for what is said of pictures that were cut away by a tool or an edit list."""
        shown = set(self.packets)
        first = [] if self.begins_whole else sorted(shown)[:2]

        def is_before_the_second(complaint: Complaint) -> bool:
            """Whether it comes where a stream that was cut begins, and not of the first picture."""
            return len(first) == 2 and complaint.packet < first[1] and complaint.packet != first[0]

        return [
            complaint
            for complaint in self.complaints
            if not (is_before_the_second(complaint) or self._is_of_a_cut(complaint, shown))
        ]

    def _is_of_a_cut(self, complaint: Complaint, shown: set[int]) -> bool:
        """Whether it is told to forget pictures that do not exist, where those around a recovery point are not shown."""
        if complaint.is_lasting or not complaint.text.startswith(_OF_REFERENCES):
            return False
        at = bisect_right(self.called_keys, complaint.packet)
        key = self.called_keys[at - 1] if at else -1
        begins_here = not self.begins_whole and self.called_keys[:1] == [key]
        return key in self.recovery_points and (begins_here or key + 1 not in shown)


def _guess(choose: Choose, packets: Packets) -> np.ndarray | None:
    """The frames that are wanted if each packet is one; None where that cannot be said."""
    try:
        return chosen(choose, packets.count, lambda: seconds_of(packets)) if packets.count else None
    except ClipError:  # of a clip of another length, or of other times, it may not be said
        return None


def _decode(
    path: str | Path, packets: Packets, *, kept: frozenset[int] = frozenset(), without_notes: bool = False
) -> _Film:
    """Decode a file from its start.

    Args:
        kept: numbers of frames to keep, if they are not too large.
        without_notes: give the decoder only what makes pictures.
    """
    with listening() as listener, open_video(path) as (container, stream):
        film = _Film(codec=stream.codec_context.codec.canonical_name)
        decoding = Decoding(container, stream, listener, without_notes=without_notes)
        nbytes, keys = 0, set()
        for frame in decoding:
            number = decoding.packet_of(frame)
            film.packets.append(number)
            if frame.key_frame:
                keys.add(number)
            film.times.append(frame.pts)
            film.matrices.append(display_matrix(frame) or (film.matrices[-1] if film.matrices else None))
            film.has_fields |= frame.interlaced_frame
            place = len(film.packets) - 1
            if (place if packets.unproved else packets.number_of(frame.pts)) in kept:
                nbytes += sum(plane.buffer_size for plane in frame.planes)
                if nbytes <= MOST_HELD_BYTES:
                    film.frames[place] = frame
        film.stamps, film.called_keys = decoding.stamps, decoding.keys
        film.complaints = decoding.complaints + [
            Complaint(packet, "one is lost", is_lasting=True) for packet in _lost(film, decoding)
        ]
        film.keys = [key for key in decoding.keys if key in keys]  # some containers call every packet one
        film.recovery_points = decoding.recovery_points
        first = min(film.packets, default=0)
        # Else packets come before the first key frame, or it is shown, and such that others could come before it.
        film.begins_whole = decoding.first_key == 0 and not (first == 0 and 0 in decoding.recovery_points)
        return film


def _lost(film: _Film, decoding: Decoding) -> list[int]:
    """Return the packets that gave no picture and should: decoders pass over some of them without a word."""
    shown = set(film.packets)
    if film.codec not in _SHOW_EACH_PACKET or film.has_fields or decoding.has_stand_ins or len(shown) < 2:
        return []
    second = sorted(shown)[1]  # what comes before it may need pictures from before a cut
    return [at for at in range(second, decoding.packet) if at not in shown and at not in decoding.unshown]


def _check_whole(
    path: str | Path, packets: Packets, film: _Film, wanted: np.ndarray, *, are_timed: bool
) -> None:
    """Raises: ClipError where frames that are wanted are damaged. wanted: their places, -1 for one without a picture."""
    are_there = bool((wanted >= 0).all())
    if are_there and not film.damaged(are_timed=are_timed)[wanted].any():
        return
    if are_there and film.codec in PICTURE_UNITS:
        bare = _decode(path, packets, without_notes=True)
        if bare.packets == film.packets and not bare.damaged(are_timed=are_timed)[wanted].any():
            return
    why = film.complaints[0].text if film.complaints else "one is not there"
    raise ClipError(f"{path}: has damaged frames ({why})")


def _taken(path: str | Path, film: _Film, wanted: np.ndarray) -> Iterator[tuple[int, "av.VideoFrame"]]:
    """Some places, and the pictures there, ascending. Raises: ClipError where a second decode gives others than the first."""
    if film.frames.keys() >= set(wanted.tolist()):
        yield from ((place, film.frames[place]) for place in wanted.tolist())
        return
    left = deque(wanted.tolist())
    with listening() as listener, open_video(path) as (container, stream):
        decoding = Decoding(container, stream, listener, without_notes=False)
        for place, frame in enumerate(decoding):
            if place != left[0]:
                continue
            if decoding.packet_of(frame) != film.packets[place]:
                break
            left.popleft()
            yield place, frame
            if not left:
                return
    raise ClipError(f"{path}: cannot be decoded (it gives other frames when it is decoded again)")
