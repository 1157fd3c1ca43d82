"""Folders of splits as people have them: understood, or refused before work with what to give instead."""

import os
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner

from evl_cache.clips import ClipList
from evl_cache.datasets.folder import read_class_folders
from evl_cache.datasets.folder_tree import read_tree
from evl_cache.datasets.split_folders import split_named
from evl_cache.errors import UsageError
from evl_cache_cli.main import cli

SPLITS = ("train/a/1.mp4", "train/b/2.mp4", "val/a/3.mp4", "val/b/4.mp4")


def lay_out(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            (root / name).touch()
        else:
            (root / name).mkdir()
    return root


def read(root: Path, split: str | None = None) -> dict[str, ClipList]:
    return read_class_folders(root, dataset="folder", annotations=None, split=split)


def refusal(root: Path, split: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        read(root, split)
    assert "expected" in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "val", "beside"),
    [
        ("train", "val", ["annotations/x.csv"]),  # fixture folder-annotations
        ("train", "val", ["annotations/train/notes.txt", "labels/", "README.md"]),
        ("Train", "Test", []),  # fixture folder-capitals
        ("TRAIN", "VAL", ["Annotations/x.csv"]),
        ("train", "validate", []),  # fixture folder-validate
        ("train", "validation", []),
        ("train", "Dev", []),
        ("training_set", "eval", []),
        ("videos_train", "videos_val", []),
        ("train_256", "val_256", []),
        ("Training Set", "Test Set", []),
    ],
)
def test_folders_called_like_splits_are_splits(
    train: str, val: str, beside: list[str], tmp_path: Path
) -> None:
    files = [name.replace("train", train).replace("val", val) for name in SPLITS]
    lists = read(lay_out(tmp_path, *files, *beside))
    assert sorted(lists) == sorted(["train", split_named(val)])
    assert [clip.path for clip in lists["train"].clips] == files[:2]
    assert [clip.path for clip in lists[str(split_named(val))].clips] == files[2:]
    assert all(clips.classes == ("a", "b") and not clips.remarks for clips in lists.values())
    assert all(clip.split == split for split, clips in lists.items() for clip in clips.clips)


def test_names_of_classes_are_no_splits() -> None:
    names = ("trains", "valley", "test tube", "training a dog", "2", "set", "test1", "train 7", "val_12")
    assert [split_named(name) for name in names] == [None] * len(names)


def test_videos_in_a_third_folder_are_told(tmp_path: Path) -> None:
    lists = read(lay_out(tmp_path, *SPLITS, "unlabeled/9.mp4", "8.mp4"))
    assert [clips.classes for clips in lists.values()] == [("a", "b")] * 2
    assert lists["train"].remarks == (
        "folders of videos beside the splits are passed over: unlabeled/",
        "videos beside the splits are passed over: 8.mp4",
    )


def test_a_single_split_beside_folders_of_videos_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "train/a/1.mp4", "holdout/a/2.mp4")
    assert "train/ holds folders of videos like a split, but holdout/ beside it is no split" in refusal(
        tmp_path
    )


def test_a_class_called_like_a_split_stays_one_where_all_hold_the_same_folder(tmp_path: Path) -> None:
    files = [f"{name}/s1/{number}.mp4" for number, name in enumerate(("bus", "car", "train"))]
    lists = read(lay_out(tmp_path / "a", *files))
    assert lists["all"].classes == ("bus", "car", "train")
    for more in ("train/s2/4.mp4", "holdout/s3/5.mp4"):
        assert "beside it is no split" in refusal(lay_out(tmp_path / more[0], *files, more))


def test_a_class_called_like_a_split_stays_a_class(tmp_path: Path) -> None:
    lists = read(lay_out(tmp_path, "train/1.mp4", "bus/2.mp4", "annotations/x.csv"))
    assert lists["all"].classes == ("bus", "train")
    assert read(lay_out(tmp_path / "x", "test/1.mp4", "notes/x.txt"))["all"].classes == ("test",)


@pytest.mark.parametrize(
    "beside",
    [
        ["train/", "val/"],
        ["train/", "val/", "test/"],
        ["train/list.txt", "val/list.txt"],
        ["train/a/notes.txt", "val/"],
        ["training/x.txt", "train/"],
    ],
)
def test_folders_called_like_splits_that_hold_no_video_hide_no_classes(
    beside: list[str], tmp_path: Path
) -> None:
    lists = read(lay_out(tmp_path, "bus/1.mp4", "car/2.mp4", *beside))
    assert list(lists) == ["all"] and lists["all"].classes == ("bus", "car")
    assert any("folders without a video are no classes" in line for line in lists["all"].remarks)


def test_a_class_called_like_a_split_stays_one_beside_an_empty_split(tmp_path: Path) -> None:
    lists = read(lay_out(tmp_path, "train/1.mp4", "bus/2.mp4", "val/"))
    assert lists["all"].classes == ("bus", "train")


def test_an_empty_split_beside_a_full_one_and_other_videos_stays_a_split(tmp_path: Path) -> None:
    lists = read(lay_out(tmp_path, "train/a/1.mp4", "val/", "unlabeled/2.mp4"), "train")
    assert list(lists) == ["train"] and lists["train"].classes == ("a",)


@pytest.mark.parametrize("names", [("test1", "test2", "test3"), ("test 1", "train_2"), ("val01", "val12")])
def test_classes_that_are_counted_are_no_splits(names: tuple[str, ...], tmp_path: Path) -> None:
    lists = read(lay_out(tmp_path, *(f"{name}/{i}.mp4" for i, name in enumerate(names))))
    assert list(lists) == ["all"] and lists["all"].classes == names


def test_classes_that_are_counted_may_hold_folders(tmp_path: Path) -> None:
    lists = read(lay_out(tmp_path, *(f"test{i}/take/{i}.mp4" for i in (1, 2, 3))))
    assert list(lists) == ["all"] and lists["all"].classes == ("test1", "test2", "test3")


def test_counted_splits_are_not_read_as_classes(tmp_path: Path) -> None:
    files = [name.replace("train", "train1").replace("val", "val1") for name in SPLITS]
    assert "train1/ and val1/ are called like splits, but for their numbers" in refusal(
        lay_out(tmp_path, *files)
    )


@pytest.mark.parametrize("name", ["train_256", "train256", "Train-1080p", "train 480p"])
def test_sizes_behind_the_name_of_a_split_are_passed_by(name: str) -> None:
    assert split_named(name) == "train"


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, *SPLITS, "validation/a/5.mp4")
    assert "val/ and validation/ are both called like the split val" in refusal(tmp_path)


def test_an_empty_folder_of_a_split_does_not_count_beside_a_full_one(tmp_path: Path) -> None:
    lists = read(lay_out(tmp_path, "train/a/1.mp4", "val/", "validation/a/5.mp4"))
    assert [clip.path for clip in lists["val"].clips] == ["validation/a/5.mp4"]


@pytest.mark.parametrize("split", [None, "train", "val"])
def test_a_root_that_is_a_level_too_high_is_refused_with_the_right_one(
    split: str | None, tmp_path: Path
) -> None:  # fixture folder-one-level-up
    lay_out(tmp_path / "d", *(f"set/{name}" for name in SPLITS))
    assert f"give --root {tmp_path / 'd' / 'set'}" in refusal(tmp_path / "d", split)
    assert f"give --root {tmp_path / 'd' / 'set'}" in refusal(tmp_path, split)
    assert read(tmp_path / "d" / "set")["val"].classes == ("a", "b")


def test_a_lone_train_folder_a_level_too_deep_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "set/train/a/1.mp4", "set/train/b/1.mp4")
    assert f"give --root {tmp_path / 'set'}" in refusal(tmp_path)


def test_splits_inside_classes_are_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, *(f"{c}/{s}/{c}{s}.mp4" for c in "abc" for s in ("train", "test")))
    said = refusal(tmp_path)
    assert "as do 3 folders in all; expected train/<class>/<video>" in said
    assert "as --root" not in said  # it would be refused at once


def test_one_class_with_splits_inside_is_told_without_a_number(tmp_path: Path) -> None:
    said = refusal(lay_out(tmp_path, "a/train/1.mp4", "a/test/2.mp4", "b/3.mp4"))
    assert "it holds test/ and train/; expected train/<class>/<video>" in said and "as --root" not in said


def test_a_root_of_several_data_sets_is_refused_with_one_that_is_read(tmp_path: Path) -> None:
    said = refusal(lay_out(tmp_path, *(f"{part}/{name}" for part in ("one", "two") for name in SPLITS)))
    assert "as do 2 folders in all" in said and f"give one folder as --root: {tmp_path / 'one'}" in said
    assert list(read(tmp_path / "one")) == ["train", "val"]


def test_a_split_unpacked_into_itself_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, *(f"{name.split('/')[0]}/{name}" for name in SPLITS))
    for split in (None, "train", "val"):  # of either, as classes of one number those of the other
        assert "/ in it is called like a split, too, and would be a class" in refusal(tmp_path, split)


def test_a_flat_test_folder_is_nobodys_business(tmp_path: Path) -> None:  # fixture folder-flat-test
    lay_out(tmp_path, *SPLITS, "test/5.mp4")
    for split in ("train", "val"):
        (clips,) = read(tmp_path, split).values()
        assert len(clips.clips) == 2 and clips.classes == ("a", "b")
        assert clips.remarks == ("videos outside folders of classes are passed over: test/",)
    assert list(read(tmp_path)) == ["train", "val"]
    assert "test: 1 video in it directly, and none in a folder of a class" in refusal(tmp_path, "test")


def test_a_flat_test_folder_stands_in_for_no_val(tmp_path: Path) -> None:
    assert list(read(lay_out(tmp_path, *SPLITS[:2], "test/5.mp4"))) == ["train"]


def test_videos_without_a_folder_of_a_class_are_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "train/1.mp4", "val/2.mp4")
    assert "videos lie in train/ and val/ of it directly, and have no label" in refusal(tmp_path)
    assert "videos lie in it directly, and have no label" in refusal(lay_out(tmp_path / "x", "1.mp4"))


# Told before work


def test_classes_without_a_video_are_told_with_what_takes_no_number(tmp_path: Path) -> None:
    (clips,) = read(lay_out(tmp_path, "a/1.mp4", "b/", "c/2.mp4", "moving/e.gif")).values()
    assert clips.classes == ("a", "c")
    assert clips.remarks == ("folders without a video are no classes, and take no number: b, moving",)


def test_a_class_that_a_split_lacks_is_told(tmp_path: Path) -> None:
    lists = read(lay_out(tmp_path, *SPLITS, "test/only/5.mp4", "train/1.mp4"))
    assert lists["train"].classes == ("a", "b", "only")
    assert lists["train"].remarks == (
        "classes without a video in train: only",
        "videos outside folders of classes are passed over: 1.mp4",
    )


def test_links_to_folders_inside_classes_are_told_and_links_to_classes_followed(tmp_path: Path) -> None:
    lay_out(tmp_path, "store/x/1.mp4", "d/train/a/2.mp4", "d/val/a/3.mp4")
    os.symlink(tmp_path / "store" / "x", tmp_path / "d" / "train" / "b")
    os.symlink(tmp_path / "store" / "x", tmp_path / "d" / "train" / "a" / "more")
    lists = read(tmp_path / "d")
    assert [clip.path for clip in lists["train"].clips] == ["train/a/2.mp4", "train/b/1.mp4"]
    assert lists["train"].remarks == ("links to folders inside a class are not followed: a/more",)


def test_folders_that_may_not_be_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, "a/1.mp4", "a/deep/2.mp4")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert read(tmp_path)["all"].remarks == ("folders that may not be read are passed over: a/deep",)


def test_a_folder_that_the_disk_cannot_list_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, "a/1.mp4", "a/deep/2.mp4")
    scandir = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("deep"):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert "deep: cannot be listed (Input/output error); expected" in refusal(tmp_path)


def test_folders_are_read_to_a_depth(tmp_path: Path) -> None:
    deep = "/".join(["d"] * 190)
    (clips,) = read(lay_out(tmp_path / "a", f"{deep}/1.mp4")).values()
    assert [clip.path for clip in clips.clips] == [f"{deep}/1.mp4"]
    deeper = "/".join(["d"] * 900)
    assert "folders are more than 200 deep" in refusal(lay_out(tmp_path / "b", f"{deeper}/1.mp4"))


def test_a_folder_of_one_video_keeps_little(tmp_path: Path) -> None:
    lay_out(tmp_path, *(f"a/{i}/v.mp4" for i in range(300)))
    tracemalloc.start()
    try:
        tree = read_tree(tmp_path, is_divided=lambda name: False)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tree.has_videos() and kept < 300 * 500  # of which the names are a third


def test_a_hidden_folder_of_videos_is_told(tmp_path: Path) -> None:
    (clips,) = read(lay_out(tmp_path, "a/1.mp4", ".Trash/2.mp4", ".cache/x.txt")).values()
    assert clips.classes == (".Trash", "a")
    assert clips.remarks == ("folders whose names begin with a dot are classes, too: .Trash",)


def test_one_class_whose_folders_look_like_classes_is_told(tmp_path: Path) -> None:
    (clips,) = read(lay_out(tmp_path, "set/a/1.mp4", "set/b/2.mp4")).values()
    assert clips.remarks == ("all videos have the one class 'set', whose folders a/, b/ are no classes",)


def test_many_names_are_told_as_three_and_a_number(tmp_path: Path) -> None:
    (clips,) = read(lay_out(tmp_path, "a/1.mp4", *(f"empty{i}/" for i in range(9)))).values()
    assert clips.remarks[0].endswith(": empty0, empty1, empty2 and 6 more")


def extract(root: Path, cache: Path) -> tuple[BaseException | None, str]:
    what = (
        f"extract --dataset folder --root {root} --layers 1-2 --model evl-tiny --device cpu --cache {cache}"
    )
    answer = CliRunner().invoke(cli, what.split())
    return answer.exception, answer.stderr


def test_extract_tells_before_work_what_it_passes_over(tmp_path: Path) -> None:  # fixture endings
    files = ("still/a.gif", "still/a.mp4", "still/b.vob", "still/c.asf", "still/d.m2ts", "moving/e.gif")
    _, said = extract(lay_out(tmp_path / "d", *files, "other/f.mp4"), tmp_path / "cache")
    lines = said.splitlines()
    tower = next(i for i, line in enumerate(lines) if "evl-tiny" in line)
    assert "passed over 5 files (2 .gif, 1 .asf, 1 .m2ts, 1 .vob), no videos by their endings" in lines[1]
    assert "folders without a video are no classes, and take no number: moving" in lines[2]
    assert tower > 2


def test_extract_refuses_a_root_that_is_a_level_too_high_without_work(tmp_path: Path) -> None:
    error, said = extract(lay_out(tmp_path, *(f"set/{name}" for name in SPLITS)), tmp_path / "cache")
    assert isinstance(error, UsageError) and "give --root" in str(error)
    assert not said and not (tmp_path / "cache").exists()
