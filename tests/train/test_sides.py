"""What a training says of its two sides before it begins: clips on both, and classes that no clip is trained on."""

from pathlib import Path

import numpy as np
import pytest

from evl_cache.batches import split_clips
from evl_cache.store import FeatureCache
from evl_cache.store.format.clip_table import ClipTable
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train import notes_of_sides
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_cache

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = TrainOptions(head="linear", epochs=1, batch=4)


def notes_of(train_cache: FeatureCache, val_cache: FeatureCache, out: Path) -> list[str]:
    """What train and sweep say, which is the same."""
    trained: list[str] = []
    swept: list[str] = []
    train(train_cache, val_cache, options=OPTIONS, out=out / "run", on_note=trained.append)
    runs = expand([{"head": ["linear", "meanpool"]}], {"epochs": 1, "batch": 4})
    sweep(train_cache, val_cache, runs=runs, out=out / "sweep", on_note=swept.append)
    assert swept == trained
    return trained


def test_sides_without_a_doubt_are_not_spoken_of(tmp_path):
    train_cache = write_cache(tmp_path / "train", labels=[0, 1, 2, 0, 1, 2])
    val_cache = write_cache(tmp_path / "val", labels=[1, 2], prefix="v", split="val")
    assert notes_of(train_cache, val_cache, tmp_path) == []


def test_a_clip_in_two_caches_is_told_by_its_name(tmp_path):
    train_cache = write_cache(tmp_path / "train", labels=[0, 1, 2])
    val_cache = write_cache(tmp_path / "val", labels=[0, 1, 2, 1, 1], split="val")  # c0 to c4
    (note,) = notes_of(train_cache, val_cache, tmp_path)
    assert note.startswith("note: 3 of 5 clips to validate on are trained on too")
    assert "('c0', 'c1', 'c2')" in note


def test_a_class_without_a_clip_to_train_on_is_told_by_its_name(tmp_path):
    train_cache = write_cache(tmp_path / "train", labels=[0, 1, 0, 1], classes=4)
    names = ("class3", "class2", "class1", "class0")
    val_cache = write_cache(tmp_path / "val", labels=[0, 2, 3, 1], names=names, prefix="v", split="val")
    (note,) = notes_of(train_cache, val_cache, tmp_path)
    assert note.startswith(
        "note: 2 of 4 classes to validate on have no clip to train on ('class2', 'class3')"
    )


def test_clips_that_are_held_out_of_one_cache_are_on_one_side(tmp_path):
    cache = write_cache(tmp_path / "all")
    rows = split_clips(cache, cache, train_names=None, val_names=["c3", "c7"])
    samples = [np.asarray(of_side) for of_side in rows]
    assert notes_of_sides((cache, cache), samples) == []
    (note,) = notes_of_sides((cache, cache), (np.arange(13), samples[1]))
    assert "2 of 2 clips" in note and "('c3', 'c7')" in note


def test_many_clips_are_not_read_one_by_one(tmp_path, monkeypatch):
    caches = write_cache(tmp_path / "train"), write_cache(tmp_path / "val", labels=[0, 1, 2], split="val")
    read = []
    one = ClipTable.__getitem__
    monkeypatch.setattr(ClipTable, "__getitem__", lambda clips, row: read.append(row) or one(clips, row))
    samples = [np.arange(13), np.arange(3)]
    (note,) = notes_of_sides(caches, samples)
    assert "3 of 3 clips" in note and "('c0', 'c1', 'c2')" in note and not read
    assert "1 of 1 clips" in notes_of_sides(caches, [np.array([7, 1]), np.array([1])])[0]
    assert read == [1, 7]  # of a few, no list of a million is read
