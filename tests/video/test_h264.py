"""What packets of x264 say of their pictures, read without decoding; any other bytes are answered with care."""

import random

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from evl_cache.video.h264 import changes_pictures, has_idr, is_progressive

FRAMES = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)


def coded(tmp_path, *, pix_fmt="yuv420p", suffix="mp4", flags=0, **options):
    """Extradata, and (bytes, is_key) of the packets of a file by x264."""
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=64, height=48, pix_fmt=pix_fmt)
        stream.options = {"preset": "ultrafast", "g": "4", **options}
        stream.codec_context.flags |= flags
        for picture in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture).reformat(format=pix_fmt)))
        container.mux(stream.encode())
    return packets_of(path)


def packets_of(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [(bytes(p), p.is_keyframe) for p in container.demux(stream) if p.size]
        return stream.codec_context.extradata, packets


START = bytes((0, 0, 0, 1))
INTERLACED = int(av.codec.context.Flags.interlaced_dct)
KINDS = {
    "baseline": {"profile": "baseline"},
    "main": {"profile": "main", "preset": "medium"},
    "high": {"profile": "high", "preset": "medium"},
    "high 10": {"pix_fmt": "yuv420p10le"},
    "high 4:2:2": {"pix_fmt": "yuv422p", "preset": "medium"},
    "high 4:4:4": {"pix_fmt": "yuv444p", "preset": "medium"},
    "lossless": {"qp": "0"},
    "scaling lists": {"x264opts": "cqm=jvt", "preset": "medium"},
    "scaling lists of 4:4:4": {"x264opts": "cqm=jvt", "preset": "medium", "pix_fmt": "yuv444p"},
    "matroska": {"suffix": "mkv"},
    "transport stream": {"suffix": "ts"},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_profile_is_read(tmp_path, name):
    extradata, packets = coded(tmp_path, **KINDS[name])
    assert is_progressive(extradata)
    assert sum(key for _, key in packets) >= 3
    for packet, key in packets:
        assert has_idr(packet, extradata) == key
        assert not changes_pictures(packet, extradata)


@pytest.mark.parametrize("name", KINDS)
def test_interlaced_coding_is_told_of_every_profile(tmp_path, name):
    if name == "baseline":  # which has none
        return
    extradata, packets = coded(tmp_path, flags=INTERLACED, **KINDS[name])
    assert not is_progressive(extradata)
    assert all(has_idr(packet, extradata) == key for packet, key in packets)


def test_key_frames_that_later_ones_look_behind_hold_no_idr_picture(tmp_path):
    for options in ("open-gop=1:bframes=2", "intra-refresh=1"):
        extradata, packets = coded(tmp_path, sc_threshold="0", preset="medium", x264opts=options)
        idr = [has_idr(packet, extradata) for packet, key in packets if key]
        assert len(idr) > 1 and idr[0] and not any(idr[1:])


def test_a_turn_within_the_stream_is_told(tmp_path):
    coded(tmp_path)
    path = tmp_path / "clip.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        turning = BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90", stream)
        packets = [bytes(p) for packet in container.demux(stream) for p in turning.filter(packet) if p.size]
    assert changes_pictures(packets[0], b"") and has_idr(packets[0], b"")  # the filter writes start codes


def test_picture_timing_which_may_mark_interlaced_pictures_is_told(tmp_path):
    extradata, packets = coded(tmp_path, x264opts="nal-hrd=vbr:vbv-maxrate=500:vbv-bufsize=500")
    assert is_progressive(extradata) and changes_pictures(packets[0][0], extradata)


def test_an_interlaced_parameter_set_within_the_packets_is_told(tmp_path):
    sps = {}
    for suffix, flags in (("progressive", 0), ("interlaced", INTERLACED)):
        extradata, _ = coded(tmp_path, flags=flags)
        sps[suffix] = extradata[8 : 8 + int.from_bytes(extradata[6:8], "big")]
    for name, unit in sps.items():
        assert changes_pictures(START + unit, b"") == (name == "interlaced")
        assert is_progressive(START + unit) == (name == "progressive")


def test_any_bytes_are_answered_and_unknown_ones_with_care(tmp_path):
    for nothing in (
        None,
        b"",
        b"\x01",
        b"\x01" * 7,
        b"\x01\x64\x00\x1f\xff\xe0",
        b"\x00\x00\x01",
        b"\x00\x00\x01\x67",
    ):
        assert not is_progressive(nothing)
        assert not has_idr(b"", nothing) and not has_idr(
            b"\x00\x00\x00\x09\x65", b"\x01\x64\x00\x1f\xff\xe0\x00"
        )
    assert changes_pictures(b"\x00\x00\x00\x09\x65", b"\x01\x64\x00\x1f\xff\xe0\x00")
    extradata, packets = coded(tmp_path, x264opts="cqm=jvt", preset="medium")
    draw = random.Random(0)
    for _ in range(1500):
        broken_data, broken = bytearray(extradata), bytearray(packets[0][0][:900])
        for data in (broken_data, broken):
            for _ in range(draw.randrange(4)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            del data[draw.randrange(1, len(data) + 1) :]
        for context in (bytes(broken_data), extradata, b""):
            is_progressive(context)
            has_idr(bytes(broken), context)
            changes_pictures(bytes(broken), context)
    for size in range(len(extradata)):  # a set that is cut off is not known to be progressive
        assert (
            not is_progressive(extradata[:size]) or size > 6 + 2 + int.from_bytes(extradata[6:8], "big") - 1
        )
