"""Trees of splits in everyday spellings, with anything in them, are read as they were built."""

import random
from pathlib import Path

import pytest

from evl_cache.datasets.folder import read_folder
from evl_cache.datasets.split_folders import split_named
from evl_cache.errors import UsageError
from tests.datasets.test_folder_walk import told
from tests.support.plain_folders import read_parts, scatter_files

FOLDERS = ("x", "x-1", "x.mp4", ".hidden", "y z", "a", "test1", "trains", "valley")  # no splits
SPLITS = {
    "train": ("train", "Train", "TRAINING", "train_256", "videos_train", "Training Set"),
    "val": ("val", "validate", "Validation", "dev", "eval", "val-1080p"),
    "test": ("test", "Test", "testing", "test_set", "Test Videos"),
}


def fill(part: Path, draw: random.Random) -> None:
    """Put anything into a folder, and a class with a video."""
    places = [part, part / "x"]
    (part / "x").mkdir(parents=True)
    (part / "x" / "sure.mp4").touch()
    for _ in range(draw.randint(0, 10)):
        folder = draw.choice(places) / draw.choice(FOLDERS)
        if not folder.exists():
            folder.mkdir()
            places.append(folder)
    scatter_files(places, draw)


def odd_tree(root: Path, draw: random.Random) -> dict[str, Path]:
    """Build a tree of classes, or of two or three splits; return its parts, as they are meant."""
    splits = draw.sample(sorted(SPLITS), draw.choice((0, 2, 3)))
    parts = {split: root / draw.choice(SPLITS[split]) for split in splits} or {"all": root}
    for part in parts.values():
        fill(part, draw)
    for name in draw.sample(("annotations", "dev", "Test", "training", "labels"), 2):
        if not splits or split_named(name) is None:  # beside classes, empty ones are no splits
            (root / name / "csv").mkdir(parents=True)
    return parts


def test_a_tree_with_anything_in_it_is_read_as_by_the_obvious_way(tmp_path: Path) -> None:
    for seed in range(120):
        root = tmp_path / str(seed)
        parts = odd_tree(root, random.Random(seed))
        assert told(read_folder(root)) == read_parts(root, parts), seed


def test_a_tree_with_anything_in_it_that_has_two_meanings_is_refused(tmp_path: Path) -> None:
    for seed in range(60):
        root, draw = tmp_path / str(seed), random.Random(seed)
        parts = odd_tree(root, draw)
        train, val = (draw.choice(SPLITS[split]) for split in ("train", "val"))
        if "all" in parts or seed % 2:  # splits inside a class
            place = draw.choice([*parts.values()]) / "x"
            for split in (train, val):
                (place / split).mkdir()
                (place / split / "a.mp4").touch()
        else:  # two folders of one split
            split, there = draw.choice([*parts.items()])
            fill(root / draw.choice([name for name in SPLITS[split] if name != there.name]), draw)
        with pytest.raises(UsageError):
            read_folder(root)
