"""A folder of classes is listed once, folder by folder, and no file is looked at whose entry tells what it is."""

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evl_cache.clips import ClipList
from evl_cache.datasets.folder import read_folder
from evl_cache.datasets.list_file import read_lists
from evl_cache.datasets.missing import missing_clips
from evl_cache.datasets.places import suffix_of
from evl_cache.errors import UsageError
from tests.support.plain_folders import FILES, scatter_files, slow_walk

FOLDERS = (
    "train",
    "val",
    "test",
    "x",
    "x-1",
    "x.mp4",
    ".hidden",
    "y z",
    "a",
    "Train",
    "dev",
    "test_set",
    "VALIDATION",
)


def told(lists: dict[str, ClipList]) -> dict[str, Any]:
    return {
        split: ([(clip.path, clip.label) for clip in found.clips], found.classes, dict(found.passed_over))
        for split, found in lists.items()
    }


def odd_tree(root: Path, seed: int) -> Path:
    draw, places = random.Random(seed), [root]
    root.mkdir()
    for _ in range(draw.randint(2, 12)):
        folder = draw.choice(places) / draw.choice(FOLDERS[: draw.choice((2, 9, 13))])
        if not folder.exists():
            folder.mkdir()
            places.append(folder)
    scatter_files(places, draw)
    return root


def test_a_tree_with_anything_in_it_is_read_as_by_the_obvious_way(tmp_path: Path) -> None:
    refused = 0
    for seed in range(120):
        root = odd_tree(tmp_path / str(seed), seed)
        try:
            found = told(read_folder(root))
        except UsageError:
            refused += 1
            assert slow_walk(root) is None, seed
        else:
            assert found == slow_walk(root), seed
    assert 10 < refused < 100


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often folders are listed and files are looked at."""
    counts: Counter[str] = Counter()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*args, **options)

        return counting

    for name in ("scandir", "stat", "lstat", "listdir"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return counts


def test_each_folder_is_listed_once_and_no_file_is_looked_at(tmp_path: Path, looks: Counter[str]) -> None:
    for split in ("train", "val"):
        for label in range(3):
            folder = tmp_path / split / f"class {label}" / "deep"
            folder.mkdir(parents=True)
            for number in range(20):
                (folder / f"{number}.mp4").touch()
                (folder / f"{number}.txt").touch()
    looks.clear()
    lists = read_folder(tmp_path)
    assert len(lists["train"].clips) == 60 and lists["val"].passed_over == {".txt": 60}
    assert looks["scandir"] == 1 + 2 + 2 * 3 * 2 and looks["listdir"] == 0
    assert looks["stat"] + looks["lstat"] <= 2  # of the root alone


def test_missing_clips_are_found_by_one_listing_of_each_folder(tmp_path: Path, looks: Counter[str]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(0, 50, 2):
            (tmp_path / folder / f"{number}.mp4").touch()
    lines = [f"{folder}/{number}.mp4 0" for number in range(50) for folder in ("a", "b")]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    clips = read_lists(tmp_path / "list.txt", split="train")["train"]
    looks.clear()
    assert len(missing_clips(clips, tmp_path)) == 50
    assert looks == {"scandir": 2}


def test_endings_are_those_of_paths() -> None:
    for name in (*FILES, "a..b", ".x", "...", "tar.gz", "A.B.C"):
        assert suffix_of(name) == Path(name).suffix.lower().removesuffix("." if name[-1] == "." else "")
