"""Tables of clips: named columns in any order, JSON lines, splits, segments, and files that name the classes."""

from pathlib import Path

import pytest

from evl_cache.clips import Segment
from evl_cache.datasets.class_file import read_class_names
from evl_cache.datasets.list_file import read_lists
from evl_cache.errors import UsageError


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(
    folder: Path, text: str, name: str = "t.csv", **given: object
) -> dict[str, list[tuple[str, str, object]]]:
    """Ids, names of classes and segments by split."""
    lists = read_lists(write(folder, text, name), **{"split": None, **given})  # type: ignore[arg-type]
    return {
        split: [(clip.id, found.classes[clip.label], clip.segment) for clip in found.clips]
        for split, found in lists.items()
    }


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na b.mp4,run\nc.mp4,\"eat, drink\"\n",
        "\ufeffLabel;Video Path\r\nrun;a b.mp4\r\neat, drink;c.mp4\r\n",
        "class\tfilename\n\nrun\ta b.mp4\n# no clip\neat, drink\tc.mp4\n",
        "# made by hand\n\"label\",\"path\",\"id\"\nrun,a b.mp4,\n\"eat, drink\",c.mp4,\n",
        'path,label,split_\na b.mp4,run,\n"c.mp4","eat, drink",,\n',
        '{"path": "a b.mp4", "label": "run"}\n\n{"label": "eat, drink", "file": "c.mp4", "start": null}\n',
    ],
)  # fmt: skip
def test_one_table_in_several_forms(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == {"all": [("a b.mp4", "run", None), ("c.mp4", "eat, drink", None)]}


def test_a_json_file_holds_one_array(tmp_path: Path) -> None:
    text = '[{"path": "a.mp4", "label": 2},\n {"path": "b.mp4", "label": "0"}]'
    assert read(tmp_path, text, "t.json") == {"all": [("a.mp4", "2", None), ("b.mp4", "0", None)]}


def test_segments_have_ids_and_units(tmp_path: Path) -> None:
    text = (
        "path,label,start,end,start_frame,end_frame,id\n"
        "a.mp4,x,1.5,3,,,\na.mp4,x,00:01:02.5,,,,\na.mp4,x,,2,,,\na.mp4,x,,,30,60.0,\nb.mp4,x,1:00,1:30,,,mine\nb.mp4,x,,,,,\n"
    )
    assert read(tmp_path, text)["all"] == [
        ("a.mp4#1.5-3", "x", Segment(unit="seconds", start=1.5, end=3)),
        ("a.mp4#62.5-", "x", Segment(unit="seconds", start=62.5)),
        ("a.mp4#0-2", "x", Segment(unit="seconds", start=0, end=2)),
        ("a.mp4#30-60", "x", Segment(unit="frames", start=30, end=60)),
        ("mine", "x", Segment(unit="seconds", start=60, end=90)),
        ("b.mp4", "x", None),
    ]


def test_one_table_makes_both_splits_which_number_classes_alike(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "path,label,split,end\na.mp4,c,Train,2\nb.mp4,b,dev,\na.mp4,a,validation,1\nd.mp4,0a,test,\n",
    )
    lists = read_lists(path, split=None)
    assert {split: [clip.label for clip in found.clips] for split, found in lists.items()} == {
        "train": [3],
        "val": [2, 1],
    }
    assert lists["train"].classes == lists["val"].classes == ("0a", "a", "b", "c")
    assert lists["train"].remarks == (
        "1 video with segments in both train and val",
        "1 clip of split test left out: --split test",
    )
    (only,) = read_lists(path, split="test").values()
    assert (only.classes, only.clips[0].label, only.is_undivided) == (lists["val"].classes, 0, False)
    without = write(tmp_path, "path,label,split\na.mp4,c,train\nb.mp4,b,test\n", "u.csv")
    assert list(read_lists(without, split=None)) == ["train", "test"]
    with pytest.raises(UsageError, match=r"no clip of split val, only of test, train; expected one of these"):
        read_lists(without, split="val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class,category\na,b,c\n", r"line 1: 'class' and 'category' both name the label"),
        ("vidio,label,split\na,b,train\n", r"line 1: no column path among .*'vidio' may be meant as path.*path,label\["),
        ("path label split\na run train\n", r"line 1: names columns .* with blanks between them; expected commas"),
        ("path,lable\na,b\n", r"line 1: no column label .*'lable' may be meant as label"),
        ("path,label,split\na.mp4,b,\n", r"line 2: no split; expected train, val"),
        ("path,label,split\na.mp4,b,fold1\n", r"line 2: split 'fold1'; expected train, val"),
        ("path,label,id\na.mp4,b\n", r"line 2: 2 fields; expected 3"),
        ('path,label\n\n"a.mp4,b\n', r"line 3: cannot be read"),
        ('path,label\n"a\nb.mp4",b\n', r"line 2: path .* holds a line end"),
        ("path,label\n,b\n", r"line 2: no path"),
        ("path,label,start_frame,end\na.mp4,b,5,9\n", r"line 2: end in seconds, start_frame in frames; expected both"),
        ("path,label,start,end,end_frame\na.mp4,b,5,,9\n", r"line 2: start in seconds, end_frame in frames"),
        ("path,label,start,duration\na.mp4,b,5,9\n", r"'start' and 'duration' name a segment, but no end"),
        ("path,label\na.mp4,[0]\n", r"line 2: '\[0\]' are several labels"),
        ("path,label\na.mp4,\"['run', 'walk']\"\n", r"line 2: .* are several labels"),
        ("video,gloss\na.mp4,run\nb.mp4,run\n", r"line 1: 'video' is no video by its ending, as those of all other"),
        ("path,label\na.mp4,b\n./a.mp4,b\n", r"'./a.mp4' occurs twice \(lines 2 and 3\)"),
        ("path,label,end,start\na.mp4,b,,0\na.mp4,b,,\n", r"'a.mp4' occurs twice \(lines 2 and 3\)"),
        ("path,label,id\na.mp4,b,v\nb.mp4,b,v\n", r"two clips have the id 'v' \(lines 2 and 3\); expected ids that name"),
        ('{"path": "a.mp4", "label": 1, "split": "train"}\n{"path": "b.mp4", "label": 1}\n', r"line 2: no split, as other"),
        ("path,label\na.mp4,\n", r"line 2: no label"),
        ("path,label\na.mp4,-1\n", r"line 2: label -1 is no class"),
        ('path,label\na.mp4,3\nb.mp4,"1,3"\n', r"line 3: '1,3' are several labels"),
        ("path,label\na.mp4,3\nb.mp4,1|3\n", r"line 3: '1\|3' are several labels"),
        ("path,label,start\na.mp4,b,-1\n", r"line 2: start '-1'; expected seconds from 0"),
        ("path,label,start\na.mp4,b,nan\n", r"line 2: start 'nan'"),
        ("path,label,end\na.mp4,b,inf\n", r"line 2: end 'inf'"),
        ("path,label,start,end\na.mp4,b,3,3\n", r"line 2: end 3 is not after start 3"),
        ("path,label,start_frame\na.mp4,b,1.5\n", r"line 2: start_frame '1.5'; expected a whole number"),
        ("path,label,start\na.mp4,b,1\na.mp4,b,1.0\n", r"'a.mp4#1-' occurs twice \(lines 2 and 3\)"),
        ("path,label,id\na.mp4,b,1\na.mp4,c,2\n", r"'a.mp4' occurs twice \(lines 2 and 3\)"),
        ("path,label,split\na.mp4,b,train\na.mp4,b,val\n", r"'a.mp4' occurs twice \(lines 2 and 3\)"),
        ('{"path": "a.mp4", "label": ["a", "b"]}\n', r"line 1: .* several labels; expected one label"),
        ('{"path": "a.mp4", "label": 1.5}\n', r"line 1: 'label' is 1.5; expected a text or a whole number"),
        ('{"path": "a.mp4", "label": true}\n', r"line 1: 'label' is true"),
        ('{"path": "a.mp4", "label": 1, "path": "b"}\n', r"line 1: not JSON \(a key that occurs twice\)"),
        ('{"path": "a.mp4", "label": 1}\n{"path": "b", "label": NaN}\n', r"line 2: not JSON \(NaN"),
        ('{"path": "a.mp4", "label": 1, "start": 1e999}\n', r"line 1: start 'inf'"),
        ('{"path": "a.mp4"}\n', r"line 1: no column label"),
        ('{"path": "a\\u0000", "label": 1}\n', r"line 1: path .* is no letter"),
        ("a.mp4,run,train\n", r"line 1: .* has 3 columns by its commas; .* name the columns in a first line: path,label,split"),
    ],
)  # fmt: skip
def test_a_table_that_is_wrong_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path, text)
    assert len(str(caught.value).splitlines()) == 1


def test_a_column_of_its_own_name_is_read_and_times_before_frames(tmp_path: Path) -> None:
    text = "path,class_id,label,start_timestamp,stop_timestamp,start_frame,stop_frame\na.mp4,7,run,00:00:01.14,3,8,89\n"
    path = write(tmp_path, text)
    (found,) = read_lists(path, split=None).values()
    assert found.classes == ("run",)
    assert found.clips[0].segment == Segment(unit="seconds", start=1.14, end=3)
    assert found.remarks == (
        "columns that are not read: 'class_id'",
        "of rows with times and frames the times are read",
    )


def test_clips_of_splits_that_are_not_read_need_no_label(tmp_path: Path) -> None:
    text = "path,label,split\na.mp4,run,train\nb.mp4,,test\nc.mp4,-1,test\nd.mp4,walk,val\n"
    assert read(tmp_path, text) == {"train": [("a.mp4", "run", None)], "val": [("d.mp4", "walk", None)]}
    with pytest.raises(UsageError, match="line 3: no label"):
        read(tmp_path, text, split="test")
    text = "path,label,split\na.mp4,run,train\nb.mp4,,test\nc.mp4,,test\n"
    assert read(tmp_path, text) == {"train": [("a.mp4", "run", None)]}
    (found,) = read_lists(tmp_path / "t.csv", split=None).values()
    assert found.remarks == ("of split test 2 clips left out, with no label or not asked for",)


def test_labels_that_often_mean_none_are_told(tmp_path: Path) -> None:
    (found,) = read_lists(write(tmp_path, "path,label\na.mp4,nan\nb.mp4,run\n"), split=None).values()
    assert found.remarks == ("'nan' is the class of 1 clip, and often marks a clip without a label",)


def test_a_split_that_is_not_read_needs_no_class_of_the_file(tmp_path: Path) -> None:
    classes = write(tmp_path, "run\nwalk\n", "names.txt")
    text = "path,label,split\na.mp4,run,train\nb.mp4,walk,val\nc.mp4,other,test\n"
    assert [*read(tmp_path, text, classes_path=classes)] == ["train", "val"]


def test_columns_that_are_not_read_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, ",path,label,splitt,fps\n0,a.mp4,b,train,25\n")
    (found,) = read_lists(path, split=None).values()
    assert found.remarks == (
        "columns that are not read: 'splitt' (is it split?), 'fps'",
        "a column without a name is not read",
    )


@pytest.mark.parametrize(
    "text",
    [
        "b\na\nc\n",
        "label\nb\na\nc\n",
        "# names\nb\na\nc",
        "id;name;count\n0;b;7\n2;c;8\n1;a;9\n",
        "id,name\n0,b\n1,a\n2,c\n",
        "name\nb\na\nc\n",
        "\ufeffclass\tid\nc\t2\nb\t0\na\t1\n",
    ],
)
def test_a_file_of_classes_fixes_names_and_order(tmp_path: Path, text: str) -> None:
    classes = write(tmp_path, text, "names.txt")
    assert read_class_names(classes) == ("b", "a", "c")
    for labels in ("01", "ba"):
        listed = write(tmp_path, f"x.mp4 {labels[0]}\ny.mp4 {labels[1]}\n", "l.txt")
        (found,) = read_lists(listed, split=None, classes_path=classes).values()
        assert ([clip.label for clip in found.clips], found.classes) == ([0, 1], ("b", "a", "c"))
        assert found.remarks == (f"1 of 3 classes of {classes} have no clip",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run\nwalk\n", r"l.txt, line 1: label 'runn' is none of the 2 classes of .*, such as 'run'"),
        ("run\nrun\n", r"names.txt, line 2: 'run' stands in line 1, too"),
        ("id,name\n0,a\n2,b\n", r"names.txt, line 3: '2,b' is no id and name; expected the ids 0 to 1"),
        ("\n", r"names.txt, line 1: the file is empty; expected one name a line"),
        ("# none\n", r"names.txt: names 0 classes"),
        (
            "1 run\n2 walk\n",
            r"names.txt, line 1: '1 run' and all others are a number and a name; .* put a line id,name",
        ),
        ("0,run\n1,walk\n", r"names.txt, line 1: '0,run' and all others are a number and a name"),
    ],
)
def test_classes_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, "a.mp4 runn\n", "l.txt", classes_path=write(tmp_path, text, "names.txt"))


def test_a_number_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"l.txt, line 1: label 2; expected numbers below 2, the number of classes"
    ):
        read(tmp_path, "a.mp4 2\n", "l.txt", classes_path=write(tmp_path, "a\nb\n", "names.txt"))


def test_names_that_are_numbers_stay_names(tmp_path: Path) -> None:
    classes = write(tmp_path, "10\n2\n1\n", "names.txt")
    assert read(tmp_path, "a.mp4 1\nb.mp4 10\n", "l.txt", classes_path=classes) == {
        "all": [("a.mp4", "1", None), ("b.mp4", "10", None)]
    }
