"""Clips as those of Kinetics are: ten seconds of H.264 at 30 frames/s, key frames as x264 sets them. And long ones."""

import os
from pathlib import Path

import av
import numpy as np

SIZES = ((240, 320), (256, 340), (360, 640))  # H, W
NUM_FRAMES = 300
OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "23", "preset": "medium"},
    "libx265": {"crf": "26", "preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx-vp9": {"crf": "34", "b": "0", "cpu-used": "8", "deadline": "realtime"},
    "libsvtav1": {"crf": "38", "preset": "12"},
    "mpeg4": {},
}
_XVID = {"bf": "2", "qmin": "3", "qmax": "6", "g": "250"}  # as most AVI files of UCF101 and HMDB51 are coded
_SPRITE = 60  # pixels


def repeat_clip(source: Path, target: Path, times: int) -> None:
    """The packets of `source` again and again, with later times: a video as long as wanted, coded once."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = read.streams.video[0]
        packets = [packet for packet in read.demux(stream) if packet.dts is not None]
        length = stream.duration
        assert length is not None
        data = [(bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in packets]
        copy = written.add_stream_from_template(stream)
        copy.time_base = stream.time_base
        for number in range(times):
            for content, pts, dts, is_key in data:
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.is_keyframe = copy, stream.time_base, is_key
                packet.pts, packet.dts = pts + number * length, dts + number * length
                written.mux(packet)


def render_clips(
    folder: Path, *, count: int, num_frames: int = NUM_FRAMES, codec: str = "libx264", suffix: str = "mp4"
) -> list[Path]:
    """`count` files by seed, of the sizes in turn; MPEG-4 in AVI has B-frames."""
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder tells errors only
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in range(count):
        path = folder / f"{seed:02d}.{suffix}"
        _render(path, seed, *SIZES[seed % len(SIZES)], num_frames=num_frames, codec=codec)
        paths.append(path)
    return paths


def render_enlarged(path: Path, *, factor: int, num_frames: int) -> None:
    """A clip of 480 x 270 times `factor` (8: 4K) of a moving picture with large pixels."""
    ground = _ground(np.random.default_rng(0), 270 + num_frames, 480 + num_frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 270 * factor, 480 * factor, "yuv420p"
        stream.options = {"crf": "30", "preset": "ultrafast"}
        for t in range(num_frames):
            picture = ground[t : t + 270, t : t + 480].repeat(factor, 0).repeat(factor, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _render(path: Path, seed: int, height: int, width: int, *, num_frames: int, codec: str) -> None:
    """A camera that sways over a textured ground, and a square that crosses it; with the noise of a sensor."""
    rng = np.random.default_rng(seed)
    ground = _ground(rng, 2 * height, 2 * width)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = _XVID if (codec, path.suffix) == ("mpeg4", ".avi") else OPTIONS[codec]
        for t in range(num_frames):
            top = int(height / 2 + height / 2 * np.sin(t / 70 + seed))
            left = int(width / 2 + width / 2 * np.sin(t / 45))
            picture = ground[top : top + height, left : left + width].copy()
            y, x = int((height - _SPRITE) * abs(np.sin(t / 23))), 3 * t % (width - _SPRITE)
            picture[y : y + _SPRITE, x : x + _SPRITE] = (200, 40, 40)
            noisy = np.clip(picture.astype(np.int16) + rng.integers(-3, 4, picture.shape), 0, 255)
            frame = av.VideoFrame.from_ndarray(noisy.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = np.zeros((height, width, 3), np.float32)
    for _ in range(24):
        (fy, fx), phases, sizes = rng.normal(0, 0.08, 2), rng.uniform(0, 6.28, 3), rng.uniform(5, 30, 3)
        waves += sizes * np.sin((fy * y + fx * x)[..., None] + phases)
    return np.clip(waves + rng.normal(0, 6, waves.shape) + 128, 0, 255).astype(np.uint8)
