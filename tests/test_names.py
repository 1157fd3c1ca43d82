"""Names of files hold anything: as people see them, and as JSON keeps them."""

import os

import pytest

from evl_cache.clips import Clip
from evl_cache.errors import reason_alone
from evl_cache.notation import encodable, escaped
from evl_cache.store.format.clip_table import ClipTable
from evl_cache.store.format.description import clips_lines

NOT_UTF8 = os.fsdecode(b"clip\xff\xe9.mp4")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("clip 3.mp4", "clip 3.mp4"),
        ("日本 é.mp4", "日本 é.mp4"),
        ("a\nb\t\r.mp4", "a\\nb\\t\\r.mp4"),
        ("a\x1b[31m\x07.mp4", "a\\x1b[31m\\x07.mp4"),
        ("\u202ea.mp4", "\\u202ea.mp4"),
        (NOT_UTF8, "clip\\xff\\xe9.mp4"),
        ("\ud83d.mp4", "\\ud83d.mp4"),
    ],
)
def test_a_terminal_is_given_escapes_of_what_it_would_act_on(name: str, told: str) -> None:
    assert escaped(name) == told
    assert told.isprintable() and told.encode()


def test_text_in_utf8_keeps_all_but_bytes_that_are_none() -> None:
    assert encodable(f"a\nb\x1b {NOT_UTF8}") == "a\nb\x1b clip\\xff\\xe9.mp4"


@pytest.mark.parametrize(
    ("reason", "name", "alone"),
    [
        ("bad.mp4: is damaged", "bad.mp4", "is damaged"),
        ("/data/a: b/bad.mp4: is damaged (h264: no)", "a: b/bad.mp4", "is damaged (h264: no)"),
        ("/data/train/x_01.mp4: is damaged", "x_01", "is damaged"),
        ("/data/bad\n1.mp4: is damaged", "bad\n1.mp4", "is damaged"),
        ("../up/bad.mp4: is damaged", "../up/bad.mp4", "is damaged"),
        ("other.mp4: is damaged", "bad.mp4", "other.mp4: is damaged"),
        ("verybad.mp4: is damaged", "bad.mp4", "verybad.mp4: is damaged"),
        ("is damaged: bad", "bad.mp4", "is damaged: bad"),
    ],
)
def test_a_reason_alone_has_no_name_of_its_file(reason: str, name: str, alone: str) -> None:
    assert reason_alone(reason, name) == alone


def test_clips_whose_names_are_not_utf8_are_read_as_they_were_written() -> None:
    clips = (Clip(id=NOT_UTF8, path=f"a/{NOT_UTF8}", label=0, split="train"),)
    lines = clips_lines(clips)
    assert lines.decode() and ClipTable(lines, "") == clips
    assert os.fsencode(ClipTable(lines, "")[0].id) == b"clip\xff\xe9.mp4"
