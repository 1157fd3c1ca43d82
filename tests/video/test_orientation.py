"""All that a display matrix can ask for, against what FFmpeg's own command shows (its filters by name)."""

import struct

import av
import numpy as np
import pytest

from evl_cache.errors import ClipError
from evl_cache.rendered import write_video
from evl_cache.video import DecodeOptions, decode_clip
from evl_cache.video.orientation import display_matrix, is_plain_turn, upright

ONE = 1 << 16
PICTURE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)

# a, b, c, d of the matrix, and what FFmpeg 9.0 and 8.1 show: checked with `ffmpeg -i x.mp4 x.ppm`
EIGHT = {
    "identity": ((1, 0, 0, 1), PICTURE),
    "clock": ((0, 1, -1, 0), np.rot90(PICTURE, -1)),
    "half a turn": ((-1, 0, 0, -1), PICTURE[::-1, ::-1]),
    "counter-clock": ((0, -1, 1, 0), np.rot90(PICTURE, 1)),
    "hflip": ((-1, 0, 0, 1), PICTURE[:, ::-1]),
    "vflip": ((1, 0, 0, -1), PICTURE[::-1]),
    "transpose": ((0, 1, 1, 0), PICTURE.transpose(1, 0, 2)),
    "anti-transpose": ((0, -1, -1, 0), PICTURE[::-1, ::-1].transpose(1, 0, 2)),
}
PLAIN = {"identity", "clock", "half a turn", "counter-clock"}


def matrix_of(a, b, c, d):
    return (*(round(value * ONE) for value in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)


@pytest.mark.parametrize("name", EIGHT)
def test_each_of_the_eight_orientations_is_shown_as_ffmpeg_shows_it(name):
    entries, expected = EIGHT[name]
    before = PICTURE.copy()
    shown = upright(PICTURE, matrix_of(*entries))
    assert np.array_equal(shown, expected) and shown.flags.c_contiguous
    assert np.array_equal(PICTURE, before)
    assert is_plain_turn(matrix_of(*entries)) == (name in PLAIN)


@pytest.mark.parametrize("name", EIGHT)
def test_unequal_scales_shears_and_shifts_do_not_change_an_orientation(name):
    (a, b, c, d), expected = EIGHT[name]
    matrix = (*matrix_of(2 * a, b / 2, c / 2, 2 * d)[:6], 77 * ONE, -5 * ONE, 1 << 30)
    assert np.array_equal(upright(PICTURE, matrix), expected)


def test_without_a_matrix_or_with_an_empty_one_pictures_stay():
    assert np.array_equal(upright(PICTURE, None), PICTURE)
    assert np.array_equal(upright(PICTURE, matrix_of(0, 0, 0, 0)), PICTURE)
    assert np.array_equal(upright(PICTURE, matrix_of(1, 0, 0.5, 1)), PICTURE)
    assert is_plain_turn(None) and not is_plain_turn(matrix_of(0, 0, 0, 0))


def test_a_tilt_of_a_degree_is_none_and_more_is_refused_with_its_angle():
    for degrees in (1, 359, 91):
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        expected = np.rot90(PICTURE, -round(degrees / 90))
        assert np.array_equal(upright(PICTURE, matrix_of(cos, sin, -sin, cos)), expected)
        assert not is_plain_turn(matrix_of(cos, sin, -sin, cos))
    cos = np.cos(np.radians(45))
    with pytest.raises(ClipError, match="by 45 degrees; expected a multiple of 90"):
        upright(PICTURE, matrix_of(cos, cos, -cos, cos))


def first_frame(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0))


def test_the_matrix_of_an_mp4_comes_with_its_frames(tmp_path):
    plain, turned = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    write_video(plain, np.zeros((3, 64, 96, 3), np.uint8))
    assert display_matrix(first_frame(plain)) is None
    data = bytearray(plain.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    for entries, _ in list(EIGHT.values())[1:]:
        struct.pack_into(">9i", data, at, *matrix_of(*entries))
        turned.write_bytes(data)
        assert display_matrix(first_frame(turned)) == matrix_of(*entries)


def test_the_matrix_of_a_matroska_file_comes_with_its_frames(tmp_path):
    rolled = write_rolled(tmp_path / "rolled.mkv", 90)
    assert display_matrix(first_frame(rolled))[:5] == (0, -ONE, 0, ONE, 0)


def write_rolled(path, degrees):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=96, height=64, pix_fmt="yuv420p")
        stream.set_display_rotation(degrees)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_a_matroska_file_is_turned_which_decord_does_not_do(tmp_path, decoder, degrees, turns):
    plain, rolled = write_rolled(tmp_path / "plain.mkv", 0), write_rolled(tmp_path / "rolled.mkv", degrees)

    def frames_of(path):
        return decode_clip(
            path, lambda count: np.arange(count)[None], options=DecodeOptions(decoder=decoder)
        ).frames

    assert np.array_equal(frames_of(rolled), np.rot90(frames_of(plain), turns, (1, 2)))


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_a_tag_that_ffmpeg_ignores_turns_nothing(tmp_path, decoder):
    plain, tagged = tmp_path / "plain.mkv", tmp_path / "tagged.mkv"
    write_video(plain, np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8))
    with av.open(str(plain)) as source, av.open(str(tagged), "w") as out:
        copy = out.add_stream_from_template(source.streams.video[0])
        copy.metadata["rotate"] = "90"  # decord turns by it, and the `ffmpeg` command of today does not
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
    found = decode_clip(tagged, lambda count: np.arange(count)[None], options=DecodeOptions(decoder=decoder))
    assert np.array_equal(found.frames, decode_clip(plain, lambda count: np.arange(count)[None]).frames)
