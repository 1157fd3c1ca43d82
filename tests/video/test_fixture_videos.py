"""The videos that people really have: right frames by every decoder, in this process and through the pool."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from evl_cache.errors import ClipError
from evl_cache.video import DecodedClip, DecodeOptions, FrameEvent, collect, decode_clip
from evl_cache.video.pool import DecodePool
from evl_cache.video.which_decord import has_decord
from tests.support.fixture_videos import Expected, copy_fixture_videos, expected_of_all

ALL = expected_of_all()
SERVED = [expected for expected in ALL if expected.accepted is not False]
DECODERS = ("auto", "pyav", "decord") if has_decord() else ("auto", "pyav")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("videos")
    copy_fixture_videos(made)
    return made


class Decoding:
    """What is served of the files, decoded once for all tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pools = {d: DecodePool(1, options=DecodeOptions(decoder=d), timeout_s=20.0) for d in DECODERS}
        self._served: dict[tuple[str, str], dict[str, DecodedClip | str]] = {}

    def through_pool(self, expected: Expected, decoder: str) -> dict[str, DecodedClip | str]:
        """What is served of a file by each view, or why it is refused."""
        key = expected.name, decoder
        if key not in self._served:
            self._served[key] = {
                view: self._clip(lambda v=view: collect(self._frames(expected, decoder, v)))  # type: ignore[misc]
                for view in expected.views
            }
        return self._served[key]

    def in_process(self, expected: Expected, decoder: str) -> dict[str, DecodedClip | str]:
        """The same, decoded in this process."""
        path, options = self._folder / expected.name, DecodeOptions(decoder=decoder)
        return {
            view: self._clip(lambda v=view: decode_clip(path, expected.choose(v), options=options))  # type: ignore[misc]
            for view in expected.views
        }

    def _frames(self, expected: Expected, decoder: str, view: str) -> Iterator[FrameEvent]:
        return self._pools[decoder].frames(self._folder / expected.name, expected.choose(view))

    @staticmethod
    def _clip(decode: Callable[[], DecodedClip]) -> DecodedClip | str:
        try:
            return decode()
        except ClipError as error:
            return str(error)

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="module")
def decoding(folder: Path) -> Iterator[Decoding]:
    found = Decoding(folder)
    yield found
    found.close()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("way", ["through_pool", "in_process"])
@pytest.mark.parametrize("expected", SERVED, ids=lambda expected: expected.name)
def test_frames_are_those_that_a_decode_from_the_start_shows(decoding, expected, way, decoder):  # type: ignore[no-untyped-def]
    for view, clip in getattr(decoding, way)(expected, decoder).items():
        if isinstance(clip, str):
            assert decoder == "decord" or expected.accepted is None, clip
        else:
            assert expected.wrong(clip, view) is None


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "expected", [e for e in ALL if e.accepted is False], ids=lambda expected: expected.name
)
def test_damaged_pictures_that_are_wanted_are_refused(decoding, expected, decoder):  # type: ignore[no-untyped-def]
    served = decoding.through_pool(expected, decoder)
    assert expected.must_be_refused("all")
    assert [
        view for view, clip in served.items() if expected.must_be_refused(view) and not isinstance(clip, str)
    ] == []


@pytest.mark.parametrize("expected", SERVED, ids=lambda expected: expected.name)
def test_decoders_give_equal_pictures_of_one_stream(decoding, expected):  # type: ignore[no-untyped-def]
    first = decoding.through_pool(expected, "auto")
    for decoder in DECODERS[1:]:
        for view, clip in decoding.through_pool(expected, decoder).items():
            if not isinstance(clip, str) and not isinstance(first[view], str):
                assert np.array_equal(clip.frames, first[view].frames), (decoder, view)


@pytest.mark.parametrize("expected", [e for e in ALL if e.twin], ids=lambda expected: expected.name)
def test_pictures_equal_those_of_the_unharmed_twin(folder, expected):  # type: ignore[no-untyped-def]
    for view in expected.views:
        harmed, whole = (
            decode_clip(folder / name, expected.choose(view), options=DecodeOptions(decoder="pyav")).frames
            for name in (expected.name, expected.twin)
        )
        assert np.array_equal(harmed, whole)
