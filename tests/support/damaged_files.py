"""Damaged and odd video files by the hundred, made from healthy ones by seed."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np

from evl_cache.rendered import demo_motion_frames, write_video

CODECS = (("libx264", "mp4"), ("libx265", "mp4"), ("libvpx-vp9", "webm"), ("libsvtav1", "mp4"), ("mpeg4", "avi"),
          ("libx264", "mkv"))  # fmt: skip
FLIPS, CUTS, ZEROED, SWAPPED, LIES = 16, 8, 8, 4, 4  # of each healthy file: forty


@dataclass(frozen=True)
class BadFile:
    """One file that is not as it should be. kind: what was done to it. surely_fails: no decoder can read it."""

    path: Path
    kind: str
    surely_fails: bool


def healthy_files(folder: Path) -> list[Path]:
    """A healthy file of each codec, 24 frames of 64 x 64 pixels; fewer where this PyAV lacks encoders."""
    made = []
    for number, (codec, suffix) in enumerate(CODECS):
        if codec not in av.codecs_available:
            continue
        path = folder / f"{codec}.{suffix}"
        write_video(path, demo_motion_frames("orbit_clockwise", number, num_frames=24), codec=codec, crf=20)
        made.append(path)
    return made


def damage(sources: list[Path], folder: Path, *, seed: int = 0) -> list[BadFile]:
    """Forty damaged copies of each source, and some files that no decoder can read."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    contents = [path.read_bytes() for path in sources]
    made = []
    for number, (source, content) in enumerate(zip(sources, contents, strict=True)):
        other = contents[(number + 1) % len(contents)]
        for kind, index, damaged in _damaged(content, other, rng):
            path = folder / f"{source.stem}-{kind}-{index:02d}{source.suffix}"
            path.write_bytes(damaged)
            made.append(BadFile(path, kind, kind == "cut" and source.suffix == ".mp4"))
    return made + _odd(folder, contents[0])


def _damaged(content: bytes, other: bytes, rng: np.random.Generator) -> Iterator[tuple[str, int, bytes]]:
    for index in range(FLIPS):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), size=2 ** index.bit_length()):
            damaged[place] ^= 1 << int(rng.integers(8))
        yield "flipped", index, bytes(damaged)
    for index in range(CUTS):
        yield "cut", index, content[: len(content) * (index + 1) // (CUTS + 2)]
    for index in range(ZEROED):
        length = max(16, len(content) * (index + 1) // 40)
        start = int(rng.integers(0, len(content) - length))
        yield "zeroed", index, content[:start] + bytes(length) + content[start + length :]
    for index in range(SWAPPED):
        size = 32 << index
        yield "swapped", index, other[:size] + content[size:]
    for index in range(LIES):
        yield "lying", index, _lying(content, index)


def _lying(content: bytes, index: int) -> bytes:
    """A container that says other numbers of frames than it holds: in MP4 its sample tables, else its first counts."""
    damaged = bytearray(content)
    places = [content.find(box) for box in (b"stsz", b"stts", b"stsc", b"stco")]
    if places[0] > 0:
        at = places[index] + (12 if index == 0 else 8)  # behind version and flags: how many entries
        damaged[at : at + 4] = (10_000 * (index + 1)).to_bytes(4, "big")
    else:
        damaged[48 + 4 * index : 52 + 4 * index] = (100_000).to_bytes(4, "little")
    return bytes(damaged)


def _odd(folder: Path, content: bytes) -> list[BadFile]:
    (folder / "zero-bytes.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n" * 100)
    (folder / "noise.webm").write_bytes(np.random.default_rng(1).bytes(5000))
    (folder / "directory.mp4").mkdir()
    os.mkfifo(folder / "fifo.mp4")
    (folder / "dangling.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "header only.mp4").write_bytes(content[:64])
    _sound_only(folder / "sound.mp4")
    names = "zero-bytes.mp4 text.mp4 noise.webm directory.mp4 fifo.mp4 dangling.mp4 sound.mp4".split()
    odd = [folder / name for name in [*names, "header only.mp4", "not there.mp4"]]
    if os.geteuid() != 0:  # whom permissions stop
        (folder / "secret.mp4").write_bytes(content)
        (folder / "secret.mp4").chmod(0)
        odd.append(folder / "secret.mp4")
    return [BadFile(path, "odd", True) for path in odd]


def _sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = np.zeros((1, 1024), np.float32)
        for _ in range(8):
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def independent_complaint(path: Path, *, frames: int) -> str | None:
    """What PyAV says of a file's first frames when it decodes them from the start; None: nothing."""
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as messages, av.open(str(path)) as container:
            first = islice(container.decode(video=0), frames)
            flagged = sum(frame.is_corrupt for frame in first)
    except (av.FFmpegError, OSError, IndexError) as error:
        return str(error)
    if flagged:
        return f"{flagged} corrupt frames"
    complaints = [text.strip() for level, _, text in messages if level <= av.logging.ERROR]
    return complaints[0] if complaints else None
