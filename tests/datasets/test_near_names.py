"""Files that are there and not found: one is shown beside the name expected, with the likeliest cause."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest

from evl_cache.clips import Clip, ClipList
from evl_cache.datasets import near_names
from evl_cache.datasets.missing import check_missing
from evl_cache.errors import UsageError


def refusal(root: Path, names: Sequence[str], files: Sequence[str]) -> str:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    clips = tuple(Clip(id=name, path=name, label=0, split="all", line=i) for i, name in enumerate(names, 1))
    with pytest.raises(UsageError) as caught:
        check_missing(ClipList(clips=clips, classes=("a",), source="l.txt"), root, allow_percent=0)
    assert "\n" not in str(caught.value)
    return str(caught.value).split("expected at most 0 %; ")[1]


E_ACUTE = "caf\N{LATIN SMALL LETTER E WITH ACUTE}.mp4"

CASES = {
    "backslashes": (r"a\b c.mp4", "a/b c.mp4", "separated by /"),
    "quotes": ('"a/b.mp4"', "a/b.mp4", "quotes are read as letters"),
    "quotes and backslashes": (r"'a\b.mp4'", "a/b.mp4", "separated by /"),
    "percent": ("a%20b.mp4", "a b.mp4", "%20 and the like"),
    "no endings": ("a/b", "a/b.mp4", "the names lack their endings"),
    "a dot, and no endings": ("a/b.1", "a/b.1.mp4", "the names lack their endings"),
    "another ending": ("a/b.avi", "a/b.mp4", "the ending differs"),
    "an ending that is passed over": ("a/b.avi", "a/b.vob", "the ending differs"),
    "capitals": ("Run/x.mp4", "run/x.MP4", "capitals differ"),
    "accents": (E_ACUTE, unicodedata.normalize("NFD", E_ACUTE), "composed otherwise"),
    "a folder more": ("a/b.mp4", "deep/er/a/b.mp4", "put it before them, move the files up"),
    "another folder": ("a/b.mp4", "c/b.mp4", "it lies in another folder"),
    "another folder and ending": ("a/b.avi", "c/b.mp4", "in another folder, and its ending differs"),
    "an absolute name": ("/data/old/a/b.mp4", "a/b.mp4", "leave out /data/old/ in them"),
    "a folder too many": ("sets/a/b.mp4", "a/b.mp4", "leave out sets/ in them"),
    "marks": ("my-clip 1.mp4", "my_clip_1.mp4", "spaces, dashes or other marks differ"),
    "no times": ("train/aaaaaaaaa00_000059_000069.mp4", "train/aaaaaaaaa00.mp4", "has no times"),
    "numbers that are no times": ("holiday_2019_12.mp4", "holiday.mp4", "a part of its name differs"),
    "a number that is no time": ("holiday_01.mp4", "holiday.mp4", "a part of its name differs"),
    "a comma and a blank": ("abc,", "abc.mp4", "a comma is read as part of the name: write path<TAB>label"),
    "a comma and words": ("a/video1, walking the", "a/video1.mp4", "a comma is read as part of the name"),
    "a comma, and another folder": ("abc, walking the", "a/abc.mp4", "a comma is read as part of the name"),
    "a comma of the name": ("a, b.avi", "a, b.mp4", "the ending differs"),
    "a part of the name": ("abcdefg.mp4", "abcdefg_small.mp4", "a part of its name differs"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_there_is_shown_with_the_cause(case: str, tmp_path: Path) -> None:
    name, there, cause = CASES[case]
    said = refusal(tmp_path / "v", [name], [there])
    assert said.startswith(f"{name} is not there, but {there} is: ") and cause in said
    assert "--root" not in said


def test_a_root_inside_the_one_that_names_begin_in_is_told_with_it(tmp_path: Path) -> None:
    said = refusal(tmp_path / "v", ["v/a/b.mp4"], ["a/b.mp4"])
    assert said.endswith(f"leave out v/ in them, or name {tmp_path} as the root")


def test_the_cause_of_most_names_is_told_with_their_number(tmp_path: Path) -> None:
    names = ["a/0.avi", "A/1.mp4", "A/2.mp4", "A/3.mp4", "far.mp4"]
    said = refusal(tmp_path, names, [f"a/{i}.mp4" for i in range(4)])
    assert said.startswith(
        "A/1.mp4 is not there, but a/1.mp4 is (and so for 3 of 5 names looked at): capitals differ"
    )


def test_a_few_of_many_names_are_looked_at(tmp_path: Path) -> None:
    said = refusal(tmp_path, [f"X/{i}.mp4" for i in range(1000)], [f"x/{i}.mp4" for i in range(1000)])
    assert "capitals differ" in said and "looked at" not in said


def test_the_file_of_another_clip_is_not_shown(tmp_path: Path) -> None:
    said = refusal(tmp_path, ["a/1.mp4", "b/1.mp4", "1.mp4", "a/1.avi"], ["a/1.mp4", "1.mp4"])
    assert said == "fetch them, or go on without them by --allow-missing 50"


def test_where_some_are_there_the_rest_may_be_left_out(tmp_path: Path) -> None:
    said = refusal(tmp_path, ["a.mp4", "B.mp4"], ["a.mp4", "b.mp4"])
    assert "capitals differ" in said
    assert said.endswith("; fetch those that are not there, or go on without them by --allow-missing 50")


def test_names_that_share_digits_are_not_alike(tmp_path: Path) -> None:
    said = refusal(tmp_path, ["video_0001.mp4"], ["video_00010.mp4", "b.mp4"])
    assert said.startswith("other names are there, such as b.mp4 (2 in all): compare them")
    assert "--root" not in said


@pytest.mark.parametrize("name", ["videos.zip", "train/part_0.tar.gz", "20bn-something-something-v2-00"])
def test_packed_videos_are_told(name: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, ["a.mp4"], [name, "notes.txt"]) == f"no video is there, but {name} is: unpack it"
    assert refusal(tmp_path, ["a.mp4", "b.mp4"], [name, "b.mp4"]).startswith(
        f"fetch them or unpack {name}, or go on"
    )


def test_another_root_is_offered_where_no_video_is_under_the_one_given(tmp_path: Path) -> None:
    assert "as --root" in refusal(tmp_path, ["a.mp4"], ["notes.txt", "x/labels.csv.gz"])


@pytest.mark.parametrize("files", [["b.MP4"], []])
def test_a_folder_that_cannot_be_listed_hides_nothing_that_is_told(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lost+found").mkdir()
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    said = refusal(tmp_path, ["a.mp4", "b.mp4"], ["a.mp4", *files])
    assert said.startswith("b.mp4 is not there, but b.MP4 is" if files else "fetch them, or go on")
    assert refusal(tmp_path, ["c.mp4"], []).startswith("other names are there, such as a.mp4 (at least ")


def test_links_that_lead_back_and_very_many_files_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v" / "x").mkdir(parents=True)
    os.symlink("..", tmp_path / "v" / "x" / "up")
    monkeypatch.setattr(near_names, "_MOST_ENTRIES", 10)
    said = refusal(tmp_path / "v", ["no.mp4"], [f"{i:02d}.mp4" for i in range(20)])
    assert "such as 00.mp4 (at least 10 in all)" in said
