"""Frames of real clips, and of clips in every codec that benchmarks render: those of a decode from the start."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.long_clips import OPTIONS, render_clips
from evl_cache.errors import ClipError
from evl_cache.sampling import strided_test_views, tsn_test_views
from evl_cache.video import Choose, DecodeOptions, collect
from evl_cache.video.pool import DecodePool
from evl_cache.video.which_decord import has_decord
from tests.support.video_writing import plain_linear_decode

VIEWS: dict[str, Choose] = {
    "centre": lambda count: strided_test_views(count, frames=8, stride=4),
    "three views": lambda count: strided_test_views(count, frames=8, stride=4, views=3),
    "tsn": lambda count: tsn_test_views(count, frames=8),
}
DECODERS = ("auto", "pyav", "decord") if has_decord() else ("auto", "pyav")
RENDERED = {"libx264": ("mp4", "mkv", "ts", "avi"), "libx265": ("mp4", "ts"), "mpeg4": ("avi", "mp4"),
            "libvpx-vp9": ("webm", "mp4"), "libsvtav1": ("mp4", "webm")}  # fmt: skip


def other_frames(paths: list[Path], decoder: str) -> dict[str, str]:
    """What is served otherwise than a decode from the start shows it, or refused, by file and view."""
    wrong = {}
    with DecodePool(2, options=DecodeOptions(decoder=decoder)) as pool:
        for path in paths:
            every = np.stack(list(plain_linear_decode(path)))
            for view, choose in VIEWS.items():
                try:
                    clip = collect(pool.frames(path, choose))
                except ClipError as error:
                    wrong |= {} if decoder == "decord" else {f"{path.name}, {view}": str(error)}
                    continue
                if clip.header.num_frames_in_file != len(every):
                    wrong[f"{path.name}, {view}"] = f"{clip.header.num_frames_in_file} frames of {len(every)}"
                elif not np.array_equal(clip.frames, every[np.unique(choose(len(every)))]):
                    wrong[f"{path.name}, {view}"] = f"other frames by {clip.header.decoder}"
    return wrong


@pytest.mark.soak
@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_of_all_real_clips(ut_interaction: Path, decoder: str) -> None:
    assert other_frames(sorted(ut_interaction.rglob("*.avi")), decoder) == {}


def test_frames_of_some_real_clips(ut_interaction: Path) -> None:
    assert other_frames(sorted(ut_interaction.rglob("*.avi"))[::12], "auto") == {}


@pytest.mark.parametrize("codec", OPTIONS)
def test_frames_of_every_rendered_codec(codec: str, tmp_path: Path) -> None:
    paths = [
        path
        for suffix in RENDERED[codec]
        for path in render_clips(tmp_path / suffix, count=1, num_frames=60, codec=codec, suffix=suffix)
    ]
    for decoder in DECODERS:
        assert other_frames(paths, decoder) == {}, decoder
