"""Whose frames, of a cache that the first rule made, may be others than they claim."""

from pathlib import Path

import pytest

from evl_cache.video import doubt
from tests.support.video_corpus import h264, older
from tests.support.video_writing import Film, Streams, write_streams

COVER = Film(encoder="mjpeg", pix_fmt="yuvj420p", frames=1, first=3000, height=288, width=384)
LARGER = h264("open-b2", first=1000, height=144, width=192)
PYAV, DECORD = "PyAV 18.1.0", "decord 0.6.0"


def written(path: Path, film: Film | None = None, **streams: object) -> Path:
    write_streams(path, Streams(film=film or h264(), **streams))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("decoder", [PYAV, DECORD])
def test_nothing_is_doubtful_of_a_file_whose_seeks_are_proved(tmp_path: Path, decoder: str) -> None:
    assert doubt(written(tmp_path / "plain.mp4"), decoder) is None


@pytest.mark.parametrize("decoder", [PYAV, DECORD])
def test_files_that_do_not_say_when_frames_are_shown_are_doubtful(tmp_path: Path, decoder: str) -> None:
    assert "AVI" in str(doubt(written(tmp_path / "old.avi", older("mpeg4", "open-b2")), decoder))


def test_pyav_took_the_first_stream_which_may_be_a_cover(tmp_path: Path) -> None:
    path = written(tmp_path / "cover.mkv", before=(COVER,), cover=0)
    assert doubt(path, PYAV) == "another of its video streams was taken"


def test_pyav_took_the_first_stream_which_may_not_be_the_default(tmp_path: Path) -> None:
    path = written(tmp_path / "three.mkv", before=(LARGER, LARGER), default=2)
    assert doubt(path, PYAV) == "another of its video streams was taken"


def test_of_several_streams_the_first_is_pyavs_without_doubt(tmp_path: Path) -> None:
    path = written(tmp_path / "two.mkv", after=(LARGER,), default=0)
    assert doubt(path, PYAV) is None
    assert doubt(path, DECORD) == "it has several video streams"


@pytest.mark.parametrize("width", [32, 96, 144])
def test_what_decord_served_rightly_is_not_doubtful_as_decord2_could_not(tmp_path: Path, width: int) -> None:
    path = written(tmp_path / "narrow.mp4", h264(width=width, height=96))
    assert doubt(path, DECORD) is None
    assert "96) are converted in several ways" in str(doubt(path, "decord 3.4.0"))


def test_widths_that_decord_itself_copied_wrongly_are_doubtful(tmp_path: Path) -> None:
    path = written(tmp_path / "narrow.mp4", h264(width=72, height=96))
    assert "72 x 96" in str(doubt(path, DECORD))
