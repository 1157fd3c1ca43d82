"""The rendered clips: the class is the motion, no single picture tells it, and the files are real video."""

from pathlib import Path

import av
import numpy as np
import pytest

from evl_cache.errors import UsageError
from evl_cache.rendered import (
    DEMO_CLASSES,
    REVERSED_PAIRS,
    demo_motion_frames,
    render_demo_motions,
    write_video,
)

BACKGROUND = 128
FRAMES = (0, 4, 7)  # whose statistics are compared


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def object_masks(frames: np.ndarray) -> np.ndarray:
    """Pixels more object than edge, bool (T, H, W)."""
    return np.abs(frames.astype(int) - BACKGROUND).max(axis=-1) > 45


def centre_on_circle(mask: np.ndarray, axis: int) -> float:
    """Mean place of a mask along one axis of a picture that wraps around, as a share of a turn."""
    angle = 2 * np.pi * (np.arange(mask.shape[axis]) + 0.5) / mask.shape[axis]
    weight = mask.sum(axis=1 - axis)
    return float(np.angle((weight * np.exp(1j * angle)).sum()) / (2 * np.pi) % 1.0)


@pytest.mark.parametrize(("forward", "backward"), REVERSED_PAIRS)
def test_reversed_class_has_the_same_frames_in_opposite_order(forward: str, backward: str) -> None:
    clip, twin = demo_motion_frames(forward, 3, seed=1), demo_motion_frames(backward, 3, seed=1)
    assert np.array_equal(clip, twin[::-1])
    assert not np.array_equal(clip, twin)


def test_frames_follow_from_the_seed_and_differ_between_splits_and_clips() -> None:
    def draw(index: int = 0, seed: int = 0, split: str = "train") -> np.ndarray:
        return demo_motion_frames("right", index, seed=seed, split=split)

    assert np.array_equal(draw(), draw())
    assert not any(
        np.array_equal(draw(), other) for other in (draw(index=1), draw(seed=1), draw(split="val"))
    )


@pytest.mark.parametrize(
    ("name", "axis", "sign"), [("right", 1, 1), ("left", 1, -1), ("down", 0, 1), ("up", 0, -1)]
)
def test_drift_moves_half_to_nine_tenths_of_a_patch_each_frame(name: str, axis: int, sign: int) -> None:
    for index in range(10):
        centres = [centre_on_circle(mask, axis) for mask in object_masks(demo_motion_frames(name, index))]
        steps = sign * ((np.diff(centres) + 0.5) % 1.0 - 0.5) * 4  # in patches of a 4 x 4 grid
        assert (steps > 0.4).all() and (steps < 1.0).all()


def test_approach_grows_but_where_the_size_starts_again() -> None:
    for index in range(10):
        areas = object_masks(demo_motion_frames("approach", index)).sum(axis=(1, 2))
        assert (np.diff(areas) < 0).sum() <= 1 <= (np.diff(areas) > 0).sum()


def test_clockwise_orbit_turns_right_at_every_frame() -> None:
    for index in range(10):
        masks = object_masks(demo_motion_frames("orbit_clockwise", index))
        x, y = (np.array([centre_on_circle(mask, axis) for mask in masks]) for axis in (1, 0))
        dx, dy = ((np.diff(path) + 0.5) % 1.0 - 0.5 for path in (x, y))
        assert (dx[:-1] * dy[1:] - dy[:-1] * dx[1:] > 0).all()  # y points down: positive is clockwise


@pytest.fixture(scope="module")
def many_clips() -> dict[str, np.ndarray]:
    """FRAMES of 200 clips of each class, (clips, frames, H, W, 3)."""
    return {
        name: np.stack([demo_motion_frames(name, index)[list(FRAMES)] for index in range(200)])
        for name in DEMO_CLASSES
    }


@pytest.mark.parametrize("frame", FRAMES)
def test_single_frames_have_the_same_statistics_in_every_class(
    frame: int, many_clips: dict[str, np.ndarray]
) -> None:
    clips = 200
    areas, means, places = [], [], []
    for name in DEMO_CLASSES:
        frames = many_clips[name][:, FRAMES.index(frame)]
        masks = object_masks(frames)
        areas.append(masks.mean(axis=(1, 2)))
        means.append(frames.mean(axis=(1, 2)))
        places.append(masks.reshape(clips, 4, 16, 4, 16).mean(axis=(2, 4)))
    # Distance of each class's mean from that of all, in standard errors of a mean of 200 clips.
    for values in (np.stack(areas), np.stack(means), np.stack(places)):
        spread = values.std(axis=(0, 1)) / np.sqrt(clips)
        assert np.abs((values.mean(axis=1) - values.mean(axis=(0, 1))) / spread).max() < 4.0


def test_rendered_files_decode_to_the_drawn_frames(tmp_path: Path) -> None:
    render_demo_motions(tmp_path, clips_per_class={"train": 2, "val": 1}, seed=5)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.mp4"))
    assert files == sorted(
        [f"train/{name}/000{index}.mp4" for name in DEMO_CLASSES for index in (0, 1)]
        + [f"val/{name}/0000.mp4" for name in DEMO_CLASSES]
    )
    for name in DEMO_CLASSES:
        drawn = demo_motion_frames(name, 0, seed=5, split="val")
        read = decoded(tmp_path / "val" / name / "0000.mp4")
        assert read.shape == drawn.shape == (8, 64, 64, 3)
        # 4:2:0 halves colour's resolution, so edges differ; the flat parts, most of the picture, do not.
        error = np.abs(read.astype(int) - drawn)
        assert error.mean() < 3.0 and np.median(error) <= 2.0


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mp4"), ("libvpx-vp9", "webm")])
def test_rendering_again_writes_the_same_bytes(codec: str, suffix: str, tmp_path: Path) -> None:
    # Again and again: libx264's macroblock tree gave one clip of a hundred other bytes.
    path, written = tmp_path / f"clip.{suffix}", set()
    frames = [demo_motion_frames(DEMO_CLASSES[i], 0, size=32) for i in (0, 3, 5)]
    for _ in range(40):
        files = []
        for clip in frames:
            write_video(path, clip, codec=codec)
            files.append(path.read_bytes())
        written.add(tuple(files))
    assert len(written) == 1


def test_rendering_a_tree_again_writes_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        render_demo_motions(tmp_path / folder, clips_per_class={"val": 1}, seed=2)
    for path in (tmp_path / "a").rglob("*.mp4"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize(
    ("codec", "suffix", "stored"), [("libx264", "mp4", "h264"), ("libvpx-vp9", "webm", "vp9")]
)
def test_written_video_is_of_the_codec_asked_for_and_close(
    tmp_path: Path, codec: str, suffix: str, stored: str
) -> None:
    across, down = np.meshgrid(np.linspace(0, 200, 48), np.linspace(0, 200, 32))
    frames = np.stack([np.stack([across, down, across * 0 + 10 * t], axis=-1) for t in range(10)]).astype(
        np.uint8
    )
    path = tmp_path / f"clip.{suffix}"
    write_video(path, frames, codec=codec, fps=25)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == (stored, 25)
    read = decoded(path)
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 4.0


@pytest.mark.parametrize(
    ("frames", "codec", "message"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), "libx264", "float32"),
        (np.zeros((0, 32, 32, 3), np.uint8), "libx264", "at least one frame"),
        (np.zeros((2, 31, 32, 3), np.uint8), "libx264", "even sides"),
        (np.zeros((2, 32, 32, 3), np.uint8), "no-such-codec", "no-such-codec"),
    ],
)
def test_unusable_frames_and_codecs_are_named_and_leave_no_file(
    tmp_path: Path, frames: np.ndarray, codec: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_video(tmp_path / "clip.mp4", frames, codec=codec)
    assert not (tmp_path / "clip.mp4").exists()


def test_unknown_class_and_impossible_numbers_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sideways"):
        demo_motion_frames("sideways", 0)
    with pytest.raises(UsageError, match="size is 31"):
        demo_motion_frames("left", 0, size=31)
    with pytest.raises(UsageError, match="num_frames is 0"):
        render_demo_motions(tmp_path, num_frames=0)
