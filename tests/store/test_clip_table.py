"""A cache's clips are a list over the bytes of `clips.jsonl`: it equals the clips, and parses what is asked for."""

import copy
import hashlib
import json
import mmap
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evl_cache.canonical_json import canonical_json, digest_matches
from evl_cache.clips import MAX_CLASSES, Clip
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store.disk import file_system
from evl_cache.store.format import clip_table
from evl_cache.store.format.clip_table import ClipTable, map_clips
from evl_cache.store.format.description import clips_lines, recovery_content

ODD_NAMES = (
    'a "b"',
    "back\\slash",
    "ünï",
    "clip\udcff\udce9.mp4",
    "",
    "x\ny",
    '"},{"id":"',
    '","label":7,"path":"',
)


def some_clips(count: int) -> tuple[Clip, ...]:
    return tuple(
        Clip(id=f"c/{row}.mp4", path=f"c/{row}.mp4", label=row % 7, split="train") for row in range(count)
    )


def odd_clips() -> tuple[Clip, ...]:
    return tuple(
        Clip(id=name, path=f"{name}/x", label=row, split="val") for row, name in enumerate(ODD_NAMES)
    )


def table_of(clips: tuple[Clip, ...]) -> ClipTable:
    return ClipTable(clips_lines(clips), "clips.jsonl")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the parser had."""
    counts, parse = [], clip_table.parse_json

    def counting(text: bytes) -> Any:
        counts.append(len(rows := parse(text)))
        return rows

    monkeypatch.setattr(clip_table, "parse_json", counting)
    return counts


@pytest.mark.parametrize("clips", [some_clips(1), some_clips(10_000), odd_clips()])
def test_a_table_is_the_list_of_its_clips(clips: tuple[Clip, ...]) -> None:
    table = table_of(clips)
    assert len(table) == len(clips) and tuple(table) == clips
    assert table == clips and clips == table and table == list(clips) and table == table_of(clips)
    assert table != clips[:-1] and table != table_of((*clips[:-1], clips[0], clips[0])) and table != "clips"
    for row in (0, -1, len(clips) // 2, np.int64(len(clips) - 1)):
        assert table[row] == clips[row]
    for part in (slice(None), slice(1, -1), slice(None, None, -3), slice(5, 2), slice(-4, None)):
        assert table[part] == clips[part]
    assert list(table.ids()) == [clip.id for clip in clips]
    assert table.rows_by_id == {clip.id: row for row, clip in enumerate(clips)}
    assert table.labels.dtype == np.int32 and table.labels.tolist() == [clip.label for clip in clips]
    assert clips[-1] in table and clips[0].id not in table and list(reversed(table)) == list(clips)[::-1]
    assert b"".join(table.canonical_parts()) == clips_lines(table) == clips_lines(clips)


def test_a_row_out_of_range_is_an_index_error() -> None:
    for row in (3, -4):
        with pytest.raises(IndexError):
            table_of(some_clips(3))[row]


def test_only_the_rows_that_are_asked_for_are_parsed(parsed: list[int]) -> None:
    table = table_of(some_clips(20_000))
    assert table[11].id == "c/11.mp4" and table[-1].label == 19_999 % 7 and len(table) == 20_000
    assert parsed == [1, 1]
    next(iter(table))
    assert max(parsed) <= 4096 and sum(parsed) <= 4098


def test_labels_of_plain_lines_parse_no_row(parsed: list[int]) -> None:
    assert table_of(some_clips(9_000)).labels.sum() == sum(row % 7 for row in range(9_000))
    assert parsed == []


def test_labels_that_are_given_are_not_read_from_the_lines(parsed: list[int]) -> None:
    given = np.arange(5)
    table = ClipTable(clips_lines(some_clips(5)), "here", labels=given)
    assert table.labels.tolist() == [0, 1, 2, 3, 4] and not table.labels.flags.writeable
    given[0] = 3  # the caller's own array stays its own
    assert parsed == []


def test_lines_of_another_form_are_the_same_clips_and_are_written_as_ours() -> None:
    clips = some_clips(9)
    rows = [{"split": "train", "path": c.path, "more": [1], "label": c.label, "id": c.id} for c in clips]
    table = ClipTable(
        "\r\n".join(json.dumps(row) for row in rows).encode(), "there"
    )  # no line break at the end
    assert table == clips and table.labels.tolist() == [c.label for c in clips]
    assert table == table_of(clips) and clips_lines(table) == clips_lines(clips)


def test_the_last_of_two_labels_counts_in_a_line_as_in_json() -> None:
    line = b'{"id":"a","label":1,"path":"a","split":"train","label":2}\n'
    assert ClipTable(line, "")[0].label == 2 and ClipTable(line, "").labels.tolist() == [2]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"null",
        b'{"id":"a"}',
        b'{"id":"a","label":-1,"path":"a","split":"train"}',
        b'{"id":"a","label":%d,"path":"a","split":"train"}' % MAX_CLASSES,
        b'{"id":"a","label":1,"path":"a","split":"train"},{"id":"b","label":1,"path":"b","split":"train"}',
        b'{"id":"a","label":01,"path":"a","split":"train"}',
        b'{"id":"\xff","label":1,"path":"a","split":"train"}',
    ],
)
def test_a_line_that_is_no_clip_is_refused_when_it_is_asked_for(line: bytes) -> None:
    table = ClipTable(clips_lines(some_clips(2)) + line + b"\n", "clips.jsonl")
    assert len(table) == 3 and table[0] == some_clips(1)[0]
    for ask in (lambda: table[2], lambda: list(table), lambda: list(table.ids()), lambda: clips_lines(table)):
        with pytest.raises((CacheDamaged, CacheError), match=r"clips\.jsonl"):
            ask()
    if b"\xff" not in line:  # of which the label can be told
        with pytest.raises((CacheDamaged, CacheError), match=r"clips\.jsonl"):
            table.labels  # noqa: B018


def test_a_table_can_be_pickled_and_copied() -> None:
    table = table_of(odd_clips())
    for other in (pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        assert other == table and other.labels.tolist() == table.labels.tolist()


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClipTable:
    """A table of a file that is mapped, as one of a megabyte is on a local disk."""
    monkeypatch.setattr(file_system, "_MAPPED_FROM_NBYTES", 1)
    monkeypatch.setattr(file_system, "is_local", lambda directory: True)
    (tmp_path / "clips.jsonl").write_bytes(clips_lines(some_clips(5_000)))
    return map_clips(tmp_path / "clips.jsonl", 1 << 30)


def test_a_mapped_table_is_shared_by_its_pickle(mapped: ClipTable, tmp_path: Path) -> None:
    assert isinstance(mapped._lines, mmap.mmap)
    written = pickle.dumps(mapped)
    assert len(written) < 1000
    assert pickle.loads(written) == mapped == some_clips(5_000)
    assert mapped.sha256 == hashlib.sha256((tmp_path / "clips.jsonl").read_bytes()).hexdigest()


def test_a_pickle_of_a_file_that_is_another_one_now_is_refused(mapped: ClipTable, tmp_path: Path) -> None:
    written = pickle.dumps(mapped)
    other = tmp_path / "other"
    other.write_bytes(clips_lines(some_clips(4_999)))
    other.replace(tmp_path / "clips.jsonl")
    assert mapped == some_clips(5_000)  # the map is of the file that was opened
    with pytest.raises(CacheDamaged, match="not what it was"):
        pickle.loads(written)
    (tmp_path / "clips.jsonl").unlink()
    with pytest.raises(CacheDamaged, match="cannot be read"):
        pickle.loads(written)


def test_a_table_takes_a_fraction_of_the_memory_of_its_clips() -> None:
    lines = clips_lines(some_clips(50_000))

    def held(make: Any) -> int:
        tracemalloc.start()
        kept = make()
        nbytes = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del kept
        return nbytes

    whole = held(lambda: tuple(ClipTable(lines, "")))

    def table() -> ClipTable:
        made = ClipTable(lines, "")
        assert len(made.labels) == sum(1 for _ in made)
        return made

    assert held(table) < whole / 10


def test_a_second_copy_is_canonical_json_of_group_and_clips() -> None:
    clips, group = odd_clips(), {"attributes": {"a": [1], "digest": "x"}, "zarr_format": 3}
    written = recovery_content(group, clips_lines(clips))
    content = json.loads(written)
    assert canonical_json(content) == written and digest_matches(content, written)
    assert content["group"] == group and tuple(map(Clip.from_json, content["clips"])) == clips
