"""Where decord and PyAV make the same RGB of a picture, and where they do not: what `decord_converts_alike` rests on."""

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from evl_cache.errors import ClipError
from evl_cache.video.h264 import is_progressive
from evl_cache.video.pixels import decord_converts_alike, rgb
from evl_cache.video.which_decord import has_decord, load_decord

needs_decord = pytest.mark.skipif(not has_decord(), reason="decord is not installed")


def write(path, codec, *, size=(64, 80), pix_fmt="yuv420p", flags=0, matrix=None, full_range=False):
    """Write three pictures of noise; return the path."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, width=size[1], height=size[0], pix_fmt=pix_fmt)
        stream.codec_context.flags |= flags
        if matrix is not None:
            stream.codec_context.colorspace = matrix
        if full_range:
            stream.codec_context.color_range = 2
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture).reformat(format=pix_fmt)
            if matrix is not None:
                frame.colorspace = matrix
            if full_range:
                frame.color_range = 2
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def by_pyav(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        alike = decord_converts_alike(stream.codec_context)
        return alike, np.stack([rgb(frame) for frame in container.decode(stream)])


def by_decord(path):
    return load_decord().VideoReader(str(path), num_threads=1).get_batch([0, 1, 2]).asnumpy()


ALIKE = {
    "H.264": ("libx264", "mp4", {}),
    "a height that is not of whole blocks": ("libx264", "mp4", {"size": (50, 38)}),
    "full range": ("libx264", "mp4", {"pix_fmt": "yuvj420p"}),
    "tagged as full range": ("libx264", "mp4", {"full_range": True}),
    "BT.709": ("libx264", "mp4", {"matrix": 1}),
    "BT.601": ("libx264", "mp4", {"matrix": 6}),
    "SMPTE 240M": ("libx264", "mp4", {"matrix": 7}),
    "BT.2020": ("libx264", "mp4", {"matrix": 9}),
    "VP8": ("libvpx", "webm", {}),
    "VP9": ("libvpx-vp9", "webm", {}),
    "odd width": ("libvpx-vp9", "webm", {"size": (34, 51)}),
}


@needs_decord
@pytest.mark.parametrize("name", ALIKE)
def test_both_decoders_make_the_same_bytes_where_it_is_said(tmp_path, name):
    codec, suffix, options = ALIKE[name]
    alike, pictures = by_pyav(write(tmp_path / f"clip.{suffix}", codec, **options))
    assert alike
    assert np.array_equal(pictures, by_decord(tmp_path / f"clip.{suffix}"))


DIFFERENT = {
    "odd height": ("libvpx-vp9", "webm", {"size": (33, 50)}),
    "ten bits": ("libx264", "mp4", {"pix_fmt": "yuv420p10le"}),
}


@needs_decord
@pytest.mark.parametrize("name", DIFFERENT)
def test_where_bytes_differ_decord_is_not_said_to_convert_alike(tmp_path, name):
    codec, suffix, options = DIFFERENT[name]
    alike, pictures = by_pyav(write(tmp_path / f"clip.{suffix}", codec, **options))
    assert not alike
    # once both agree, the rule can be relaxed
    assert not np.array_equal(pictures, by_decord(tmp_path / f"clip.{suffix}"))


@needs_decord
def test_interlaced_pictures_differ_and_their_parameter_sets_tell(tmp_path):
    flags = int(av.codec.context.Flags.interlaced_dct)
    path = write(tmp_path / "clip.mp4", "libx264", flags=flags)
    _, pictures = by_pyav(path)
    with av.open(str(path)) as container:
        assert not is_progressive(container.streams.video[0].codec_context.extradata)
        assert all(frame.interlaced_frame for frame in container.decode(video=0))
    assert not np.array_equal(pictures, by_decord(path))


@pytest.mark.parametrize("width", [16, 48, 72, 96])
def test_widths_that_decord_copies_wrongly_are_not_for_it(tmp_path, width):
    alike, pictures = by_pyav(write(tmp_path / "clip.mp4", "libx264", size=(64, width)))
    assert not alike and pictures.shape == (3, 64, width, 3)


def test_pixels_do_not_depend_on_the_number_of_threads(tmp_path):
    for name, (codec, suffix, options) in {**ALIKE, **DIFFERENT}.items():
        path = write(tmp_path / f"{name}.{suffix}", codec, **options)
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                assert np.array_equal(rgb(frame), frame.to_ndarray(format="rgb24", threads=3)), name


def tagged(tmp_path, matrix):
    """A file whose pictures claim a colour matrix, by its number in H.273; nothing else of it differs."""
    source, path = write(tmp_path / "plain.mp4", "libx264"), tmp_path / f"{matrix}.mp4"
    with av.open(str(source)) as container, av.open(str(path), "w") as out:
        stream = container.streams.video[0]
        copy = out.add_stream_from_template(stream)
        tag = BitStreamFilterContext(f"h264_metadata=matrix_coefficients={matrix}", stream, copy)
        for packet in container.demux(stream):
            for changed in tag.filter(packet if packet.size else None):
                changed.stream = copy
                out.mux(changed)
    return path


def test_bt2020_with_constant_luminance_is_converted_as_bt2020(tmp_path):
    alike, constant = by_pyav(tagged(tmp_path, 10))
    _, usual = by_pyav(tagged(tmp_path, 9))
    _, other = by_pyav(tagged(tmp_path, 1))
    assert not alike
    assert np.array_equal(constant, usual) and not np.array_equal(constant, other)


def test_colours_that_cannot_be_converted_are_an_error_that_names_them(tmp_path):
    path = tagged(tmp_path, 8)
    with av.open(str(path)) as container:
        assert not decord_converts_alike(container.streams.video[0].codec_context)
        frame = next(container.decode(video=0))
        with pytest.raises(ClipError, match="yuv420p, matrix 8 of ITU-T"):
            rgb(frame)
