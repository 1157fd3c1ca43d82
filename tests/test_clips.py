"""Lists of clips: what is read, and what is refused with its line number."""

import json
from types import SimpleNamespace

import pytest

from evl_cache.batches.folds import split_clips
from evl_cache.canonical_json import digest
from evl_cache.clips import MAX_CLASSES, Clip, ClipList, number_labels, select
from evl_cache.datasets.folder import read_folder
from evl_cache.datasets.list_file import read_lists
from evl_cache.datasets.list_lines import parse_list
from evl_cache.errors import CacheError, UsageError


def read(tmp_path, text, name="clips.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_lists(path, split="train")["train"]


def pairs(clips: ClipList):
    return [(clip.path, clip.label) for clip in clips.clips]


def test_numbers_are_kept_as_they_are(tmp_path):
    clips = read(tmp_path, "a.mp4 2\nb.mp4 0\n")
    assert pairs(clips) == [("a.mp4", 2), ("b.mp4", 0)]
    assert clips.classes == ("0", "1", "2")
    assert [clip.split for clip in clips.clips] == ["train", "train"]


def test_names_are_numbered_in_alphabetical_order(tmp_path):
    clips = read(tmp_path, "a.mp4 run\nb.mp4 jump\nc.mp4 run\n")
    assert pairs(clips) == [("a.mp4", 1), ("b.mp4", 0), ("c.mp4", 1)]
    assert clips.classes == ("jump", "run")


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("my best clip.mp4 run", "my best clip.mp4", "run"),
        ("  dir one/b c.mp4   run  ", "dir one/b c.mp4", "run"),
        ("a.mp4\trun fast", "a.mp4", "run fast"),
        ("my clip.mp4\trun fast", "my clip.mp4", "run fast"),
        ("odd\tname.mp4\trun", "odd\tname.mp4", "run"),
        ("line\u2028break.mp4 run", "line\u2028break.mp4", "run"),
        ("größe.mp4 läuft", "größe.mp4", "läuft"),
        ("a.mp4 run\r", "a.mp4", "run"),
        ("/abs/a.mp4 -1", "/abs/a.mp4", "-1"),
    ],
)
def test_paths_and_labels_may_hold_odd_characters(line, path, label):
    (found,) = parse_list(line + "\n", source="x")
    assert (found.path, found.label) == (path, label)


def test_empty_lines_are_skipped_and_counted():
    assert [row.line for row in parse_list("\na 1\n\n   \nb 2\n", source="x")] == [2, 5]


@pytest.mark.parametrize("bad", ["b.mp4", "  b.mp4  ", "b.mp4\t", "\tb.mp4"])
def test_a_line_without_a_label_is_named(tmp_path, bad):
    with pytest.raises(UsageError, match=r"clips.txt, line 3: 'b.mp4' has no label; expected 'path label'"):
        read(tmp_path, f"a.mp4 1\n\n{bad}\nc.mp4 2\n")


def test_mixed_labels_name_the_line_of_the_odd_one(tmp_path):
    with pytest.raises(UsageError, match="line 4: label 'run' among labels like '1'"):
        read(tmp_path, "a 1\n\nb 2\nc run\n")
    with pytest.raises(UsageError, match="line 2: label '1' among labels like 'run'"):
        read(tmp_path, "a run\nb 1\n")


def test_a_number_that_is_no_class_is_refused_before_it_fills_the_memory():
    with pytest.raises(UsageError, match="x, line 7: label 20231231; expected class numbers below"):
        number_labels(["1", "20231231"], source="x", lines=[6, 7])
    numbers, classes = number_labels([str(MAX_CLASSES - 1)], source="x", lines=[1])
    assert numbers == [MAX_CLASSES - 1] and len(classes) == MAX_CLASSES


def test_a_clip_that_stands_twice_is_named_with_both_lines(tmp_path):
    with pytest.raises(UsageError, match=r"'a.mp4' occurs twice \(lines 1 and 4\)"):
        read(tmp_path, "a.mp4 1\nb.mp4 1\n\na.mp4 2\n")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_list_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match=r"clips\.txt.*no clip"):
        read(tmp_path, text)


def test_a_missing_or_binary_list_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.txt: cannot be read"):
        read_lists(tmp_path / "nothing.txt", split=None)["all"]
    (tmp_path / "video.mp4").write_bytes(b"\x00\xff\xfe\x80" * 9)
    with pytest.raises(UsageError, match=r"video\.mp4: is no list of clips \(it holds zeros\)"):
        read_lists(tmp_path / "video.mp4", split=None)["all"]


def test_the_content_id_follows_ids_labels_and_order_and_not_where_files_lie(tmp_path):
    def content(*rows):
        clips = tuple(Clip(id=i, path=path, label=label, split=split) for i, path, label, split in rows)
        return ClipList(clips=clips, classes=("x", "y"), source="s").content_id

    a, b = ("a", "/p/a", 0, "train"), ("b", "/p/b", 1, "train")
    known = content(a, b)
    assert content(("a", "/elsewhere/a", 0, "val"), b) == known
    assert (
        len(
            {
                known,
                content(b, a),
                content(a),
                content(("a", "/p/a", 1, "train"), b),
                content(("c", "/p/a", 0, "train"), b),
            }
        )
        == 5
    )


def test_a_clip_survives_its_json_row():
    clip = Clip(id="i", path="p q.mp4", label=3, split="val")
    assert Clip.from_json(clip.to_json()) == clip
    with pytest.raises(CacheError, match="not a clip"):
        Clip.from_json({"id": "i"})


def test_select_finds_ids_and_paths_in_the_order_asked_for():
    clips = [Clip(id=f"id{i}", path=f"dir/{i}.mp4", label=0, split="all") for i in range(3)]
    assert select(clips, ["dir/2.mp4", "id0"], source="f") == [2, 0]
    with pytest.raises(UsageError, match="f: 'id9' is no clip"):
        select(clips, ["id0", "id9"], source="f")
    with pytest.raises(UsageError, match="names no clip"):
        select(clips, [], source="f")


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_a_folder_of_classes_is_one_split(tmp_path):
    make_files(
        tmp_path,
        "walk/b.mp4",
        "walk/a b.AVI",
        "jump/c.webm",
        "jump/notes.txt",
        "jump/.hidden.mp4",
        "empty/x.txt",
    )
    lists = read_folder(tmp_path)
    assert list(lists) == ["all"]
    assert lists["all"].classes == ("jump", "walk")
    assert pairs(lists["all"]) == [("jump/c.webm", 0), ("walk/a b.AVI", 1), ("walk/b.mp4", 1)]


def test_a_folder_of_splits_numbers_classes_over_all_of_them(tmp_path):
    make_files(tmp_path, "train/b/1.mp4", "train/c/1.mp4", "validation/a/1.mp4", "validation/c/2.mp4")
    lists = read_folder(tmp_path)
    assert set(lists) == {"train", "val"}
    assert lists["train"].classes == lists["val"].classes == ("a", "b", "c")
    assert pairs(lists["train"]) == [("train/b/1.mp4", 1), ("train/c/1.mp4", 2)]
    assert pairs(lists["val"]) == [("validation/a/1.mp4", 0), ("validation/c/2.mp4", 2)]
    assert {clip.split for clip in lists["val"].clips} == {"val"}


def test_a_class_called_train_among_others_is_a_class(tmp_path):
    make_files(tmp_path, "train/1.mp4", "plane/1.mp4")
    assert read_folder(tmp_path)["all"].classes == ("plane", "train")


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        read_folder(tmp_path / "nothing")
    make_files(tmp_path, "a/readme.txt")
    with pytest.raises(UsageError, match="no video in any folder"):
        read_folder(tmp_path)


def named(count):
    return tuple(
        Clip(id=f"id{row}", path=f"folder/{row}.mp4", label=row % 3, split="train") for row in range(count)
    )


def test_select_looks_through_the_list_once(monkeypatch):
    class Looked(tuple):
        looks = 0

        def __iter__(self):
            type(self).looks += 1
            return super().__iter__()

    clips = Looked(named(100))
    assert select(clips, ("id7", "folder/3.mp4", "id7"), source="s") == [7, 3, 7]
    assert Looked.looks == 1


def test_an_id_counts_before_a_path_and_the_last_of_equal_paths():
    names = (("a", "b"), ("b", "c"), ("c2", "x"), ("d", "x"))
    clips = [Clip(id=clip_id, path=path, label=0, split="train") for clip_id, path in names]
    assert select(clips, ["b", "c", "x"], source="s") == [1, 1, 3]


def test_the_content_id_of_a_long_list_is_the_digest_of_the_whole():
    for count in (1, 4095, 4096, 4097, 9000):
        clips = ClipList(clips=named(count), classes=("a", "b", "c"), source="s")
        assert clips.content_id == digest([[clip.id, clip.label] for clip in clips.clips])


def test_clips_of_one_list_share_their_texts():
    rows = [{"id": f"{row}", "path": f"{row}", "label": 0, "split": "train"} for row in range(2)]
    one, other = map(Clip.from_json, [json.loads(json.dumps(row)) for row in rows])
    assert one.id is one.path and one.split is other.split
    assert not hasattr(one, "__dict__")


@pytest.mark.parametrize("sides", [("train",), ("val",), ("train", "val")])
def test_what_one_side_names_is_left_out_of_the_other(sides):
    clips = named(50)
    source = SimpleNamespace(clips=clips, spec=SimpleNamespace(content_id="x"))
    names = {side: [f"id{row}" for row in range(start, 50, 5)] for start, side in enumerate(sides)}
    train, val = split_clips(source, source, train_names=names.get("train"), val_names=names.get("val"))
    rows = [sorted(set(range(50)) - set(range(0, 50, 5))), list(range(0, 50, 5)), list(range(1, 50, 5))]
    expected = {("train",): (rows[1], rows[0]), ("val",): (rows[0], rows[1])}
    assert (train, val) == expected.get(sides, (rows[1], rows[2]))


def test_a_clip_on_both_sides_is_named():
    source = SimpleNamespace(clips=named(9), spec=SimpleNamespace(content_id="x"))
    with pytest.raises(UsageError, match=r"'id3' and 1 more are in --train-clips and in --val-clips"):
        split_clips(source, source, train_names=["id5", "id3"], val_names=["id3", "id4", "id5"])
