"""What stands beside a file's pictures must not keep them from being decoded."""

from pathlib import Path

import pytest

from evl_cache.errors import ClipError
from evl_cache.video import decode_clip
from tests.support.decoding_survey import every_seventh
from tests.support.numbered_films import numbers_shown
from tests.support.video_corpus import h264
from tests.support.video_writing import Streams, write_streams

_TAGS = {"film.mp4": b"VideoHandler", "film.mkv": b"Lavf", "film.ts": b"Service01"}


@pytest.mark.parametrize("name", _TAGS)
def test_tags_of_any_bytes_do_not_matter(tmp_path: Path, name: str) -> None:
    """Recorders write titles in the encoding of their country."""
    path, tag = tmp_path / name, _TAGS[name]
    write_streams(path, Streams(film=h264()))
    content = path.read_bytes()
    assert tag in content
    path.write_bytes(content.replace(tag, b"\xe9\xff" + tag[2:]))
    found = decode_clip(path, every_seventh)
    assert numbers_shown(found.frames) == found.header.distinct.tolist()


def test_a_stream_that_begins_later_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV looks it up among those that it knows; whether it does, depends on what lies in memory."""
    write_streams(tmp_path / "film.ts", Streams(film=h264()))

    def demux(container: object, stream: object) -> list[object]:
        raise IndexError("list index out of range")

    monkeypatch.setattr("evl_cache.video.packets._demux", demux)
    with pytest.raises(ClipError, match="another stream begins within it"):
        decode_clip(tmp_path / "film.ts", every_seventh)
