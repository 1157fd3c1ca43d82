"""Files that were cut off: refused where anything shows it, as their last frames are not those that they claim."""

from pathlib import Path

import av
import numpy as np
import pytest

from evl_cache.errors import ClipError
from evl_cache.video import decode_clip
from tests.support.decoding_survey import every_seventh
from tests.support.numbered_films import numbers_shown
from tests.support.video_corpus import h264, hevc, older
from tests.support.video_surgery import cut_avi_index, scale_avi_length
from tests.support.video_writing import Film, Streams, write_streams


def _cut(path: Path, film: Film, share: float, **streams: object) -> None:
    write_streams(path, Streams(film=film, **streams))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0.25, 0.4, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("film", [older("mpeg4", "open-b2"), h264("closed-b0")], ids=["mpeg4", "h264"])
@pytest.mark.parametrize("after", [(), ("mp2",)], ids=["silent", "sound"])
def test_an_avi_file_without_its_end_is_refused(
    tmp_path: Path, film: Film, share: float, after: tuple[str, ...]
) -> None:
    """FFmpeg shortens the length that it tells of such a file, so that nothing seems to be missing."""
    _cut(tmp_path / "cut.avi", film, share, after=after)
    with pytest.raises(ClipError, match=r"its end is missing|has damaged frames"):
        decode_clip(tmp_path / "cut.avi", every_seventh)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.6, 0.75, 0.9])
def test_where_the_cut_falls_between_frames_the_avi_file_is_refused_too(tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.avi"
    _cut(path, older("mpeg4", "closed-b0"), 1.0)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"00dc", int(len(content) * share) // 2)])
    with pytest.raises(ClipError, match="its end is missing"):
        decode_clip(path, every_seventh)


def test_an_avi_file_without_index_is_whole_whatever_its_headers_count(tmp_path: Path) -> None:
    """Recorders that were stopped leave no index, and no or too few frames in the header."""
    for factor in (1.0, 0.4, 0.0):
        path = tmp_path / f"{factor}.avi"
        _cut(path, older("mpeg4", "open-b2"), 1.0)
        scale_avi_length(path, factor)
        cut_avi_index(path)
        found = decode_clip(path, every_seventh)
        assert numbers_shown(found.frames) == found.header.distinct.tolist()
        assert found.header.num_frames_in_file == 60


@pytest.mark.parametrize(
    ("film", "old", "new"),
    [
        (h264("open-b2"), b"\x01", b"\x0c"),  # a picture that no other needs becomes a unit that fills space
        (hevc("open-b2"), b"\x00\x01", b"\x4c\x01"),
        (older("mpeg2video", "open-b2"), b"\x00\x00\x01\x00", b"\x00\x00\x01\xb2"),  # notes of the user
    ],
    ids=["h264", "hevc", "mpeg2"],
)
def test_a_picture_that_is_passed_over_without_a_word_is_missed(
    tmp_path: Path, film: Film, old: bytes, new: bytes
) -> None:
    path = tmp_path / "film.mkv"
    write_streams(path, Streams(film=film))
    content = bytearray(path.read_bytes())
    start = _start_of_a_picture(path, after=25)
    at = content.index(old, start)
    assert at < start + 24
    content[at : at + len(old)] = new
    path.write_bytes(content)
    with pytest.raises(ClipError, match="has damaged frames"):
        decode_clip(path, every_seventh)
    found = decode_clip(path, lambda count: np.array([[0, 5, 10]]))
    assert numbers_shown(found.frames) == [0, 5, 10]


def _start_of_a_picture(path: Path, *, after: int) -> int:
    """Return where the data of the first B-frame after so many packets begin in a Matroska file."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    place = next(
        at for at in range(after, 60) if packets[at].pts < packets[at - 1].pts and not packets[at].is_keyframe
    )
    return path.read_bytes().index(bytes(packets[place])[:40])


def test_packets_that_stand_for_frames_that_were_never_coded_are_no_loss(tmp_path: Path) -> None:
    """DivX and Xvid put a packet of a byte or a few where a frame repeats the one before, or came packed with it."""
    write_streams(tmp_path / "film.avi", Streams(film=older("mpeg4", "closed-b0")))
    with av.open(str(tmp_path / "film.avi")) as source, av.open(str(tmp_path / "gaps.avi"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        number = 0
        for at, packet in enumerate(packets):
            pieces = [packet, av.Packet(b"\x00\x00\x01\xb6\x50\x4f")] if at % 20 == 10 else [packet]
            for piece in pieces:
                piece.pts = piece.dts = number
                piece.time_base, piece.stream = packet.time_base, stream
                target.mux(piece)
                number += 1
    found = decode_clip(tmp_path / "gaps.avi", every_seventh)
    assert found.header.num_frames_in_file == len(packets)
    assert numbers_shown(found.frames) == list(found.header.distinct)


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_damage_of_the_sound_is_no_damage_of_the_pictures(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"film.{suffix}"
    _write_with_broken_sound(path)
    found = decode_clip(path, every_seventh)
    assert numbers_shown(found.frames) == list(found.header.distinct)


def test_a_container_that_damage_of_the_sound_cuts_short_has_lost_data(tmp_path: Path) -> None:
    """Sound and pictures are chained in FLV: what follows the first damaged piece is not found."""
    path = tmp_path / "film.flv"
    _write_with_broken_sound(path)
    with pytest.raises(ClipError, match="has lost data"):
        decode_clip(path, every_seventh)


def _write_with_broken_sound(path: Path) -> None:
    write_streams(path, Streams(film=h264("closed-b0"), after=("mp2" if path.suffix == ".avi" else "aac",)))
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        sound = [
            (packet.pos, packet.size) for packet in container.demux(container.streams.audio[0]) if packet.size
        ]
    for place, size in sound:
        for at in range(place, place + min(8, size)):
            content[at] ^= 0x5A
    path.write_bytes(content)
