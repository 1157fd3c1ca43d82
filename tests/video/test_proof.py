"""The proof that can be asked for compares every frame with a decode from the start, and finds what it is there to find."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from evl_cache import video
from evl_cache.errors import ClipError
from evl_cache.video import Choose, ClipHeader, DecodeOptions, FrameEvent, decode_clip
from evl_cache.video.packets import Packets
from evl_cache.video.proof import VARIABLE
from tests.support.video_corpus import NumberedFile

Serve = Callable[[str | Path, Choose, Packets], Iterator[FrameEvent]]


@pytest.fixture(autouse=True)
def proves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")


@pytest.fixture
def seekable(corpus: list[NumberedFile]) -> Path:
    return next(file.path for file in corpus if file.path.name == "h264-closed-b2.mp4")


def every_third(count: int) -> np.ndarray:
    return np.arange(0, count, 3)[None]


def serving(monkeypatch: pytest.MonkeyPatch, change: Callable[[FrameEvent], FrameEvent]) -> None:
    """Let what a seek serves be changed on its way."""
    real: Serve = video.seek_frames

    def changed(path: str | Path, choose: Choose, packets: Packets) -> Iterator[FrameEvent]:
        yield from map(change, real(path, choose, packets))

    monkeypatch.setattr(video, "seek_frames", changed)


@pytest.mark.parametrize("decoder", ["auto", "decord"])
@pytest.mark.parametrize("name", ["h264-closed-b0.mp4", "h264-closed-b2.mp4", "h264-closed-pyramid.mkv"])
def test_right_frames_are_served(corpus: list[NumberedFile], name: str, decoder: str) -> None:
    (file,) = (file for file in corpus if file.path.name == name)
    found = decode_clip(file.path, every_third, options=DecodeOptions(decoder=decoder))
    assert found.header.num_frames_in_file == len(file.numbers)


@pytest.mark.parametrize("name", ["h264-open-b2.mp4", "h264-open-b2.ts", "h264-refresh-b2.mkv"])
def test_a_decode_from_the_start_is_its_own_proof(corpus: list[NumberedFile], name: str) -> None:
    (file,) = (file for file in corpus if file.path.name == name)
    assert decode_clip(file.path, every_third).header.num_frames_in_file == len(file.numbers)


def test_another_picture_is_found(seekable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(event: FrameEvent) -> FrameEvent:
        if isinstance(event, np.ndarray):
            event[0, 0, 0, 0] ^= 1
        return event

    serving(monkeypatch, change)
    with pytest.raises(ClipError, match=r"proof failed: frame 0 by PyAV .* is another picture"):
        decode_clip(seekable, every_third)


def test_another_count_is_found(seekable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(event: FrameEvent) -> FrameEvent:
        if not isinstance(event, ClipHeader):
            return event
        return ClipHeader(
            indices=event.indices,
            num_frames_in_file=event.num_frames_in_file + 1,
            frame_size=event.frame_size,
            decoder=event.decoder,
        )

    serving(monkeypatch, change)
    with pytest.raises(ClipError, match=r"proof failed: PyAV .* counts \d+ frames, \d+ are shown"):
        decode_clip(seekable, every_third)
