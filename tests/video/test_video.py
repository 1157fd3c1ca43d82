"""Frames of every kind of file, by both decoders; what cannot be decoded says why."""

import struct
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from evl_cache.clips import Clip
from evl_cache.errors import ClipError, UsageError
from evl_cache.extract.augmentation import ViewAugmentation, view_generator
from evl_cache.extract.prepare import choose_frames, prepare_clip
from evl_cache.preprocess import spatial_crops
from evl_cache.rendered import demo_motion_frames, write_video
from evl_cache.sampling import strided_train_view
from evl_cache.spec import ViewSpec
from evl_cache.video import DecodeOptions, decode_clip, decode_frames, frames
from tests.support.store_helpers import small_tower

CODECS = {"libx264": "mp4", "libvpx-vp9": "webm", "libx265": "mp4"}


def some(count):
    """First, one in the middle and the last; and a second view."""
    return np.array([[0, count // 2, count - 1], [0, 0, count - 1]])


def drawn(frames=9, height=64, width=80):
    square = demo_motion_frames("right", 0, size=64, num_frames=frames)
    return np.concatenate([square, square], axis=2)[:, :height, :width]


def pyav_frames(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("codec", "suffix", "shape"),
    [
        *((codec, suffix, shape) for codec, suffix in CODECS.items() for shape in ((64, 80), (80, 64))),
        ("libx264", "mp4", (50, 38)),
        ("libvpx-vp9", "webm", (50, 38)),  # not libx265, whose encoder breaks down at such a size
    ],
)
def test_both_decoders_give_the_frames_of_the_file(tmp_path, codec, suffix, shape):
    path = tmp_path / f"clip.{suffix}"
    frames = demo_motion_frames("up", 1, size=96, num_frames=9)[:, : shape[0], : shape[1]]
    write_video(path, np.ascontiguousarray(frames), codec=codec)
    every = pyav_frames(path)
    for decoder in ("decord", "pyav"):
        found = decode_clip(path, some, options=DecodeOptions(decoder=decoder))
        assert (found.header.num_frames_in_file, found.frames.shape) == (9, (3, *shape, 3))
        assert np.array_equal(found.view(0), [every[0], every[4], every[8]])
        assert np.array_equal(found.view(1), [every[0], every[0], every[8]])
        served = "pyav" if codec == "libx265" else decoder
        assert found.header.decoder.lower().startswith(served)
    assert decode_clip(path, some).header.decoder.startswith("PyAV")


def test_what_decord_cannot_open_is_decoded_by_pyav(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, drawn(), codec="libsvtav1")
    every = pyav_frames(path)
    for decoder in ("auto", "decord"):
        found = decode_clip(path, some, options=DecodeOptions(decoder=decoder))
        assert found.header.decoder.startswith("PyAV") and found.header.num_frames_in_file == 9
        assert np.array_equal(found.view(0), [every[0], every[4], every[8]])


@pytest.mark.parametrize(("degrees", "turns"), [(90, 3), (180, 2), (270, 1)])
def test_a_turned_video_is_turned_upright_by_both(tmp_path, degrees, turns):
    write_video(tmp_path / "plain.mp4", drawn())
    turn(tmp_path / "plain.mp4", tmp_path / "turned.mp4", degrees)
    plain = decode_clip(tmp_path / "plain.mp4", some).frames
    for decoder in ("decord", "pyav"):
        found = decode_clip(tmp_path / "turned.mp4", some, options=DecodeOptions(decoder=decoder)).frames
        assert np.array_equal(found, np.rot90(plain, turns, axes=(1, 2)))


def turn(source, target, degrees):
    """Write the display matrix of the track header (ISO 14496-12, 8.3.2): 40 bytes after the box's name."""
    a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    content = bytearray(source.read_bytes())
    start = content.find(b"tkhd") + 44
    one = 1 << 16
    content[start : start + 36] = struct.pack(">9i", a * one, b * one, 0, -b * one, a * one, 0, 0, 0, 1 << 30)
    target.write_bytes(content)


def test_one_frame_and_frames_that_do_not_come_evenly(tmp_path):
    write_video(tmp_path / "one.mp4", drawn(1))
    with av.open(str(tmp_path / "uneven.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 64, 80, "yuv420p"
        for number, picture in enumerate(drawn()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number**2 * 3, Fraction(1, 90)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for decoder in ("decord", "pyav"):
        assert decode_clip(
            tmp_path / "one.mp4", some, options=DecodeOptions(decoder=decoder)
        ).frames.shape == (1, 64, 80, 3)
        found = decode_clip(tmp_path / "uneven.mp4", some, options=DecodeOptions(decoder=decoder))
        every = pyav_frames(tmp_path / "uneven.mp4")
        assert np.array_equal(found.view(0), [every[0], every[4], every[8]])


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_ten_bits_a_channel_are_pyavs_whoever_is_asked(tmp_path, codec):
    with av.open(str(tmp_path / "ten.mp4"), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 80, "yuv420p10le"
        for picture in drawn():
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"))
            )
        container.mux(stream.encode())
    usual = decode_clip(tmp_path / "ten.mp4", some)
    asked = decode_clip(tmp_path / "ten.mp4", some, options=DecodeOptions(decoder="decord"))
    assert asked.header.decoder == usual.header.decoder == f"PyAV {av.__version__}"
    assert np.array_equal(asked.frames, usual.frames)
    assert np.median(np.abs(usual.frames.astype(int) - drawn()[[0, 4, 8]])) <= 2


def test_files_without_pictures_say_so(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video " * 100)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name in ("empty", "text", "sound"):
        with pytest.raises(ClipError, match=rf"{name}\.mp4: cannot be decoded \(.+\)"):
            decode_clip(tmp_path / f"{name}.mp4", some)
    with pytest.raises(ClipError, match="it has no video stream"):
        decode_clip(tmp_path / "sound.mp4", some, options=DecodeOptions(decoder="pyav"))
    with pytest.raises(UsageError, match="expected one of auto, decord, pyav"):
        decode_clip(tmp_path / "text.mp4", some, options=DecodeOptions(decoder="ffmpeg"))


@pytest.mark.parametrize("piece_bytes", [1, 2 * 64 * 64 * 3])
def test_frames_come_in_pieces_and_are_the_same(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(frames, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "clip.mp4"
    write_video(path, demo_motion_frames("up", 1, num_frames=24))
    every = pyav_frames(path)
    for decoder in ("decord", "pyav"):
        wanted = np.array([[23, 3, 4, 5, 11], [0, 23, 23, 7, 9]])
        header, *pieces = decode_frames(
            path, lambda count, w=wanted: w, options=DecodeOptions(decoder=decoder)
        )
        assert max(piece.nbytes for piece in pieces) <= max(piece_bytes, every[0].nbytes)
        assert header.distinct.tolist() == [0, 3, 4, 5, 7, 9, 11, 23]
        assert np.array_equal(np.concatenate(pieces), [every[i] for i in header.distinct])


@pytest.mark.parametrize("train_views", [0, 2])
def test_crops_made_piece_by_piece_equal_those_of_whole_views(tmp_path, motions, train_views):
    """Two views of three crops, or augmented ones, of a frame larger than the tower's; the last frame stands often."""
    path = tmp_path / "clip.mp4"
    write_video(path, demo_motion_frames("up", 1, size=96, num_frames=20)[:, :70])
    tower = small_tower(motions).spec
    views = (
        ViewSpec(frames=6, stride=5, train_views=2, flip=True)
        if train_views
        else ViewSpec(frames=6, stride=5, temporal_views=2, spatial_views=3)
    )
    prepared = prepare_clip(
        Clip(id="c", path=path.name, label=0, split="train"),
        tmp_path,
        tower=tower,
        views=views,
        decode=decode_frames,
    )
    found = decode_clip(path, lambda count: choose_frames(count, views, "c"))
    how = {"size": tower.image_size, "mean": tower.mean, "std": tower.std}
    if train_views:
        whole = []
        for view in range(2):
            rng = view_generator(0, "c", view)
            strided_train_view(20, frames=6, stride=5, rng=rng)
            drawn = ViewAugmentation.draw(rng, height=70, width=96, flip=True)
            whole.append(drawn.apply(found.view(view), **how))
    else:
        crops = [spatial_crops(found.view(view), **how, crops=3) for view in range(2)]
        whole = [crops[view][crop] for crop in range(3) for view in range(2)]
    assert torch.equal(prepared.samples, torch.stack(whole))


def test_transparency_is_left_out(tmp_path):
    path, pictures = tmp_path / "clip.webm", drawn()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 80, "yuva420p"
        stream.options = {"crf": "10", "b": "0", "cpu-used": "5"}
        for picture in pictures:
            alpha = np.full((64, 80, 1), 100, np.uint8)
            frame = av.VideoFrame.from_ndarray(np.concatenate([picture, alpha], axis=2), format="rgba")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    one, other = (
        decode_clip(path, some, options=DecodeOptions(decoder=name)).frames for name in ("decord", "pyav")
    )
    assert np.array_equal(one, other)
    assert np.median(np.abs(one.astype(int) - pictures[[0, 4, 8]])) <= 2


def test_without_decord_pyav_decodes(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", drawn())
    monkeypatch.setitem(sys.modules, "decord", None)  # as where it is not installed
    assert decode_clip(tmp_path / "clip.mp4", some).header.decoder.startswith("PyAV")
    with pytest.raises(
        UsageError, match=r"decord' is not installed; pip install decord2 .* use --decoder auto"
    ):
        DecodeOptions(decoder="decord")
