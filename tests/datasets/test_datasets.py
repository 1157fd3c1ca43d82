"""Data sets as publishers lay them out, read from trees of empty files; malformed annotation files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from evl_cache.clips import Clip, ClipList
from evl_cache.datasets.missing import check_missing, missing_clips
from evl_cache.datasets.registry import DATASETS
from evl_cache.errors import UsageError

HEADER = "label,youtube_id,time_start,time_end,split"
TRAIN_ROWS = [
    "javelin throw,--07WQ2iBlw,1,11,train",
    "abseiling,-3B32lodo2M,59,69,train",
    "passing American football (in game),0b_c-d_e-fG,0,10,train",
    "zumba,zzz_ZZZ-000,999,1009,train",
]
VAL_ROWS = [  # "abseiling" is absent: numbers must not move
    "zumba,valZ_000000,5,15,{val}",
    "javelin throw,-valJ00000_,12345,12355,{val}",
]
K400_CLASSES = ("abseiling", "javelin throw", "passing American football (in game)", "zumba")
TRAIN_IDS = (
    "--07WQ2iBlw_000001_000011",
    "-3B32lodo2M_000059_000069",
    "0b_c-d_e-fG_000000_000010",
    "zzz_ZZZ-000_000999_001009",
)
VAL_IDS = ("valZ_000000_000005_000015", "-valJ00000__012345_012355")


def read(
    name: str,
    root: Path,
    *,
    annotations: Path | None = None,
    split: str | None = None,
    list_path: Path | None = None,
) -> dict[str, ClipList]:
    return DATASETS[name].read(root, annotations=annotations, split=split, list_path=list_path)


def put(path: Path, text: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def lay_out(root: Path, files: Mapping[str, str]) -> Path:
    root.mkdir(exist_ok=True)
    for name, text in files.items():
        put(root / name, text)
    return root


def csv_text(rows: list[str], header: str = HEADER) -> str:
    return "\n".join([header, *rows]) + "\n"


def kinetics_annotations(val: str = "val") -> dict[str, str]:
    val_rows = [row.format(val=val) for row in VAL_ROWS]
    return {"annotations/train.csv": csv_text(TRAIN_ROWS), "annotations/val.csv": csv_text(val_rows)}


def labels_of(clips: ClipList) -> list[int]:
    return [clip.label for clip in clips.clips]


def ids_of(clips: ClipList) -> tuple[str, ...]:
    return tuple(clip.id for clip in clips.clips)


def paths_of(clips: ClipList) -> list[str]:
    return [clip.path for clip in clips.clips]


def naively_missing(clips: ClipList, root: Path) -> list[Clip]:
    return [clip for clip in clips.clips if not (root / clip.path).is_file()]


# Kinetics


def kinetics_place(layout: str, split: str, clip_id: str, label: str) -> str:
    underscored = label.replace(" ", "_")
    return {
        "flat": f"{split}/{clip_id}.mp4",
        "by class": f"{split}/{label}/{clip_id}.mp4",
        "by class with underscores": f"{split}/{underscored}/{clip_id}.mp4",
        "other ending": f"{split}/{clip_id}.mkv",
        "root": f"{clip_id}.mp4",
        "classes in the root": f"{label}/{clip_id}.mp4",
        "validate": f"{'validate' if split == 'val' else split}/{clip_id}.mp4",
    }[layout]


@pytest.mark.parametrize(
    "layout",
    [
        "flat",
        "by class",
        "by class with underscores",
        "other ending",
        "root",
        "classes in the root",
        "validate",
    ],
)
def test_kinetics_is_found_in_every_layout_with_the_same_content(layout: str, tmp_path: Path) -> None:
    root = lay_out(tmp_path / "k400", kinetics_annotations())
    expected: dict[str, list[str]] = {"train": [], "val": []}
    for split, ids, rows in (("train", TRAIN_IDS, TRAIN_ROWS), ("val", VAL_IDS, VAL_ROWS)):
        for clip_id, row in zip(ids, rows, strict=True):
            expected[split].append(kinetics_place(layout, split, clip_id, row.split(",")[0]))
            put(root / expected[split][-1])
    lists = read("k400", root)
    assert list(lists) == ["train", "val"]
    assert {split: paths_of(clips) for split, clips in lists.items()} == expected
    assert ids_of(lists["train"]) == TRAIN_IDS
    assert ids_of(lists["val"]) == VAL_IDS
    assert labels_of(lists["train"]) == [1, 0, 2, 3]
    assert labels_of(lists["val"]) == [3, 1]
    assert lists["train"].classes == lists["val"].classes == K400_CLASSES
    assert [clip.line for clip in lists["val"].clips] == [2, 3]
    assert {clip.split for clip in lists["val"].clips} == {"val"}
    assert missing_clips(lists["train"], root) == missing_clips(lists["val"], root) == []


def test_kinetics_content_id_does_not_depend_on_where_files_lie(tmp_path: Path) -> None:
    flat = lay_out(tmp_path / "a", kinetics_annotations() | {f"train/{i}.mp4": "" for i in TRAIN_IDS})
    by_class = lay_out(tmp_path / "b", kinetics_annotations() | {f"train/x/{i}.mp4": "" for i in TRAIN_IDS})
    assert paths_of(read("k400", flat)["train"]) != paths_of(read("k400", by_class)["train"])
    assert read("k400", flat)["train"].content_id == read("k400", by_class)["train"].content_id


@pytest.mark.parametrize(
    ("train_name", "val_name"),
    [
        ("train.csv", "val.csv"),
        ("annotations/train.csv", "annotations/validate.csv"),
        ("annotations/kinetics400_train.csv", "annotations/kinetics400_val.csv"),
        ("kinetics400/train.csv", "kinetics400/validate.csv"),
        ("kinetics_400_train.csv", "k400_val.csv"),
    ],
)
def test_kinetics_annotations_are_found_by_their_usual_names(
    train_name: str, val_name: str, tmp_path: Path
) -> None:
    texts = list(kinetics_annotations(val="validate").values())
    lists = read("k400", lay_out(tmp_path, {train_name: texts[0], val_name: texts[1]}))
    assert {split: labels_of(clips) for split, clips in lists.items()} == {
        "train": [1, 0, 2, 3],
        "val": [3, 1],
    }
    assert lists["val"].source == str(tmp_path / val_name)


@pytest.mark.parametrize("split", ["val", "validate", "validation"])
def test_val_alone_is_numbered_over_the_train_annotation(split: str, tmp_path: Path) -> None:
    root = lay_out(tmp_path, kinetics_annotations())
    by_split = read("k400", root, split=split)
    by_file = read("k400", root, split=split, annotations=root / "annotations" / "val.csv")
    assert list(by_split) == ["val"]
    assert by_split == by_file
    assert labels_of(by_split["val"]) == [3, 1]
    assert by_split["val"].classes == K400_CLASSES


def test_one_file_gives_the_splits_it_holds(tmp_path: Path) -> None:
    rows = [row.format(val="val") for row in VAL_ROWS]
    both = put(tmp_path / "given" / "all.csv", csv_text([rows[0], *TRAIN_ROWS, rows[1]]))
    lists = read("k700", tmp_path, annotations=both)
    assert labels_of(lists["val"]) == [3, 1]
    assert labels_of(lists["train"]) == [1, 0, 2, 3]
    only_val = put(tmp_path / "alone" / "val.csv", csv_text(rows))
    alone = read("k700", tmp_path, annotations=only_val)
    assert list(alone) == ["val"]
    assert alone["val"].classes == ("javelin throw", "zumba")


def test_kinetics_reads_is_cc_quotes_crlf_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    text = (
        "\ufeff" + HEADER + ",is_cc\r\n"
        '"tying knot (not on a tie), slowly",abc,1,11,train,0\r\n'
        "\r\n"
        '"say ""hello""",def,2,12,train,1\r\n'
    )
    root = lay_out(tmp_path, {"train.csv": text})
    clips = read("k600", root, split="train")["train"]
    assert clips.classes == ('say "hello"', "tying knot (not on a tie), slowly")
    assert [(clip.id, clip.label, clip.line) for clip in clips.clips] == [
        ("abc_000001_000011", 1, 2),
        ("def_000002_000012", 0, 4),
    ]


def test_missing_kinetics_clips_are_expected_beside_their_neighbours(tmp_path: Path) -> None:
    by_class = lay_out(tmp_path / "a", kinetics_annotations())
    put(by_class / f"train/javelin_throw/{TRAIN_IDS[0]}.mp4")
    (by_class / "train" / "abseiling").mkdir()
    assert paths_of(read("k400", by_class)["train"])[:2] == [
        f"train/javelin_throw/{TRAIN_IDS[0]}.mp4",
        f"train/abseiling/{TRAIN_IDS[1]}.mp4",
    ]
    nothing = lay_out(tmp_path / "b", kinetics_annotations())
    assert paths_of(read("k400", nothing)["val"])[0] == f"val/{VAL_IDS[0]}.mp4"


def test_partial_downloads_and_hidden_files_are_no_videos(tmp_path: Path) -> None:
    root = lay_out(tmp_path, kinetics_annotations())
    for name in (f"{TRAIN_IDS[0]}.mp4.part", f".{TRAIN_IDS[1]}.mp4", f"{TRAIN_IDS[2]}.txt", TRAIN_IDS[3]):
        put(root / "train" / name)
    clips = read("k400", root)["train"]
    assert missing_clips(clips, root) == list(clips.clips)


def test_the_published_format_wins_where_a_clip_lies_there_twice(tmp_path: Path) -> None:
    root = lay_out(tmp_path, kinetics_annotations())
    for suffix in ("avi", "webm", "mp4"):
        put(root / "train" / f"{TRAIN_IDS[0]}.{suffix}")
    assert paths_of(read("k400", root)["train"])[0] == f"train/{TRAIN_IDS[0]}.mp4"


GOOD = "a,abc,1,11,train"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the file is empty"),
        (" \n\n", "line 1: the file is empty"),
        (",,\n,,\n", "line 1: header '' lacks label"),
        (HEADER + "\n", "line 1: only a header"),
        (GOOD + "\n", "line 1: header 'a,abc,1,11,train' lacks label, youtube_id"),
        ("youtube_id,time_start,time_end,split\nabc,1,11,test\n", "line 1: header .* lacks label;"),
        (HEADER.replace(",", ";") + "\n", "line 1: header .* lacks"),
        (csv_text([GOOD, "a,def,1.5,11,train"]), "line 3: time_start '1.5'; expected a whole number"),
        (csv_text(["a,def,1,eleven,train"]), "line 2: time_end 'eleven'"),
        (csv_text(["a,def,-1,11,train"]), "line 2: time_start '-1'"),
        (csv_text(["a,def,1,²,train"]), "line 2: time_end '²'"),
        (csv_text(["a,def," + "9" * 5000 + ",11,train"]), "line 2: time_start '9"),
        (csv_text(["a,def,11,11,train"]), "line 2: time_end 11 is not after time_start 11"),
        (csv_text([GOOD, "", "a,def,1,11,trian"]), "line 4: split 'trian'; expected train, val"),
        (csv_text([",def,1,11,train"]), "line 2: no label"),
        (csv_text(["a,../def,1,11,train"]), "line 2: youtube_id '../def'"),
        (csv_text(["a,,1,11,train"]), "line 2: youtube_id ''"),
        (csv_text([GOOD, "a,def,1,11"]), "line 3: 4 fields; expected 5"),
        (csv_text(["a, b,def,1,11,train"]), "line 2: 6 fields; expected 5"),
        (csv_text([GOOD, '"a,def,1,11,train', "b,ghi,1,11,train"]), "line 3: not CSV"),
        (csv_text([GOOD, "a,x,1,11,train", GOOD]), "'abc_000001_000011' occurs twice .lines 2 and 4"),
        (csv_text(["a,abc,1,11,val"]), "line 2: no row of split train, only val"),
        (HEADER.encode() + b"\n\xff,abc,1,11,train\n", "line 2: not UTF-8"),
    ],
)
def test_a_malformed_kinetics_file_is_refused_by_line(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    path = put(tmp_path / "train.csv", text)
    with pytest.raises(UsageError, match=message) as caught:
        read("k400", tmp_path, split="train")
    assert str(path) in str(caught.value)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_val_label_that_train_does_not_have_is_refused(tmp_path: Path) -> None:
    files = kinetics_annotations()
    files["annotations/val.csv"] += "knitting,abc,1,11,val\n"
    with pytest.raises(
        UsageError, match=r"val\.csv, line 4: label 'knitting' is in no train row of .*train\.csv"
    ):
        read("k400", lay_out(tmp_path, files))


def test_absent_and_ambiguous_annotations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no train annotation of Kinetics-400 in .*train\.csv.*--annotations"
    ):
        read("k400", tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        read("k400", tmp_path, annotations=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"no such folder.*--root"):
        read("k400", tmp_path / "nowhere")
    lay_out(tmp_path, kinetics_annotations() | {"annotations/validate.csv": csv_text(["a,b,1,2,val"])})
    with pytest.raises(UsageError, match=r"several files.*val\.csv, validate\.csv"):
        read("k400", tmp_path)
    with pytest.raises(UsageError, match="--split 'vall' is unknown; expected train, val"):
        read("k400", tmp_path, split="vall")


# Something-Something v2

SSV2_LABELS = {"Holding something": "1", "Approaching something with your camera": "0"}
SSV2_TRAIN = [
    {
        "id": "78687",
        "label": "holding a potato",
        "template": "Holding [something]",
        "placeholders": ["potato"],
    },
    {"id": "42326", "label": "…", "template": "Approaching [something] with your camera", "placeholders": []},
]
SSV2_VAL = [
    {"id": "74225", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["cup"]}
]


def ssv2_files(prefix: str = "annotations/something-something-v2-") -> dict[str, str]:
    return {
        f"{prefix}labels.json": json.dumps(SSV2_LABELS, indent=1),
        f"{prefix}train.json": json.dumps(SSV2_TRAIN, indent=1),
        f"{prefix}validation.json": json.dumps(SSV2_VAL),
    }


@pytest.mark.parametrize("folder", ["20bn-something-something-v2/", "videos/", ""])
@pytest.mark.parametrize(
    "prefix", ["annotations/something-something-v2-", "labels/", "something-something-v2-"]
)
def test_something_reads_labels_splits_and_paths(folder: str, prefix: str, tmp_path: Path) -> None:
    root = lay_out(tmp_path, ssv2_files(prefix) | {f"{folder}{i}.webm": "" for i in (78687, 42326, 74225)})
    lists = read("ssv2", root)
    assert {split: labels_of(clips) for split, clips in lists.items()} == {"train": [1, 0], "val": [1]}
    assert ids_of(lists["train"]) == ("78687", "42326")
    assert paths_of(lists["train"]) == [f"{folder}78687.webm", f"{folder}42326.webm"]
    assert lists["val"].classes == ("Approaching something with your camera", "Holding something")
    assert [clip.line for clip in lists["train"].clips] == [2, 10]  # where each `{` stands
    assert list(read("ssv2", root, split="validation")) == ["val"]


def test_something_test_split_has_no_labels(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no labels; expected train or val"):
        read("ssv2", lay_out(tmp_path, ssv2_files()), split="test")


def test_something_annotations_must_be_a_folder(tmp_path: Path) -> None:
    root = lay_out(tmp_path, ssv2_files("elsewhere/"))
    assert labels_of(read("ssv2", root, annotations=root / "elsewhere")["val"]) == [1]
    with pytest.raises(UsageError, match="is a file; expected the folder"):
        read("ssv2", root, annotations=root / "elsewhere" / "train.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the file is empty"),
        ("\n{}", "line 2: begins with"),
        ("[]", "line 1: the list is empty"),
        ("[\n1]", "line 2: an entry is int, not an object"),
        (
            '[{"id": "1", "template": "Holding [something]"},\n{"id": "2"}]',
            "line 2: 'template' of an entry is missing",
        ),
        ('[{"id": 1, "template": "Holding [something]"}]', "line 1: 'id' of an entry is int"),
        ('[{"id": "1/../2", "template": "Holding [something]"}]', "line 1: id '1/../2'"),
        ('[\n\n{"id": "1", "template": "Holdin [something]"}]', "line 3: clip 1 has the template .*not in"),
        ('[{"id": "1", "template": "Holding [something]"}', "line 1: the list does not end"),
        ('[{"id": "1", "template": "Holding [something]"} 7]', "line 1: '7' after an entry"),
        ('[{"id": "1", "template": "Holding [something]"}]\n7', "line 2: something after the end"),
        ('[{"id": "1", "template": "Holding [something]"},\n]', "line 2: not JSON"),
        ('[{"id": "1",\n"template" "x"}]', "line 2: not JSON"),
        ("[\n" + "[" * 100_000, "line 2: nested too deep"),
        ('[\n{"id": ' + "9" * 5000 + "}]", "line 2: not readable JSON"),
        (b"[\n\xff]", "line 2: not UTF-8"),
        (
            '[{"id": "1", "template": "Holding [something]"},\n{"id": "1", "template": "Holding [something]"}]',
            "'1' occurs twice .lines 1 and 2",
        ),
    ],
)
def test_a_malformed_something_file_is_refused_by_line(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    root = lay_out(tmp_path, ssv2_files())
    path = put(root / "annotations" / "something-something-v2-train.json", text)
    with pytest.raises(UsageError, match=message) as caught:
        read("ssv2", root, split="train")
    assert str(path) in str(caught.value)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "line 1: holds list, not an object"),
        ("{}", "line 1: holds no label"),
        ('{"a": "0",\n "b": "2"}', "line 2: 'b' has number '2'; expected each of 0 to 1 once"),
        ('{"a": "0",\n "b": "0"}', "line 2: 'b' has number '0', which 'a' has"),
        ('{"a": "0",\n "b": true}', "line 2: 'b' has number True"),
        ('{"a": "0",\n "b": [1]}', r"line 2: 'b' has number \[1\]"),
        ('{"a": "0",\n "a": "1"}', "line 2: 'a' occurs twice"),
        ('{"a": "0"}\n{}', "something after the end"),
        ('{"a":' * 100_000, "line 1: nested too deep"),
        ('{"a": "0"', "line 1: not JSON"),
    ],
)
def test_a_malformed_labels_file_is_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    root = lay_out(tmp_path, ssv2_files())
    path = put(root / "annotations" / "something-something-v2-labels.json", text)
    with pytest.raises(UsageError, match=message) as caught:
        read("ssv2", root)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# UCF101


def ucf_files(folder: str = "ucfTrainTestlist") -> dict[str, str]:
    files = {f"{folder}/classInd.txt": "1 ApplyEyeMakeup\r\n2 YoYo\r\n"}
    for fold in (1, 2, 3):
        a, b = f"g{fold:02d}", f"g{fold + 10:02d}"
        files[f"{folder}/trainlist0{fold}.txt"] = (
            f"ApplyEyeMakeup/v_ApplyEyeMakeup_{a}_c01.avi 1\nYoYo/v_YoYo_{a}_c01.avi 2\n"
        )
        files[f"{folder}/testlist0{fold}.txt"] = f"YoYo/v_YoYo_{b}_c01.avi\n"
    return files


@pytest.mark.parametrize("base", ["UCF-101/", "videos/", ""])
def test_ucf101_reads_each_fold(base: str, tmp_path: Path) -> None:
    root = lay_out(tmp_path, ucf_files())
    put(root / f"{base}YoYo/v_YoYo_g02_c01.avi")
    put(root / f"{base}ApplyEyeMakeup/v_ApplyEyeMakeup_g02_c01.mp4")
    lists = read("ucf101", root, split="2")
    assert ids_of(lists["train"]) == ("ApplyEyeMakeup/v_ApplyEyeMakeup_g02_c01", "YoYo/v_YoYo_g02_c01")
    assert ids_of(lists["val"]) == ("YoYo/v_YoYo_g12_c01",)
    assert (labels_of(lists["train"]), labels_of(lists["val"])) == ([0, 1], [1])
    assert lists["val"].classes == ("ApplyEyeMakeup", "YoYo")
    assert paths_of(lists["train"]) == [
        f"{base}ApplyEyeMakeup/v_ApplyEyeMakeup_g02_c01.mp4",
        f"{base}YoYo/v_YoYo_g02_c01.avi",
    ]
    assert paths_of(lists["val"]) == [f"{base}YoYo/v_YoYo_g12_c01.avi"]  # missing: where it should be


@pytest.mark.parametrize(
    ("split", "names", "fold"),
    [
        (None, ["train", "val"], 1),
        ("3", ["train", "val"], 3),
        ("split2", ["train", "val"], 2),
        ("train", ["train"], 1),
        ("train3", ["train"], 3),
        ("val02", ["val"], 2),
        ("test", ["val"], 1),
        ("validation_2", ["val"], 2),
    ],
)
def test_a_fold_is_named_in_the_split(split: str | None, names: list[str], fold: int, tmp_path: Path) -> None:
    lists = read("ucf101", lay_out(tmp_path, ucf_files("annotations")), split=split)
    assert list(lists) == names
    assert all(str(fold) in Path(clips.source).stem for clips in lists.values())


@pytest.mark.parametrize("split", ["4", "0", "train0", "train4", "", "split", "11", "trian1"])
def test_an_unknown_fold_is_refused(split: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is unknown; expected train or val, with the fold 1 to 3"):
        read("ucf101", lay_out(tmp_path, ucf_files()), split=split)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classInd.txt", "1 A\n3 B\n", "line 2: '3 B'; expected '2 <"),
        ("classInd.txt", "1 A\n2 A\n", "line 2: '2 A'"),
        ("classInd.txt", "1\n", "line 1: '1'"),
        ("classInd.txt", "", "line 1: the file is empty"),
        ("trainlist01.txt", "YoYo/v_YoYo_g01_c01.avi\n", "line 1: .* has no class number"),
        ("trainlist01.txt", "\nYoYo/v.avi 1\n", "line 2: YoYo has number 1; expected 2"),
        ("trainlist01.txt", "Nope/v.avi 1\n", "line 1: class 'Nope' is not in classInd.txt"),
        ("trainlist01.txt", "YoYo/../../v.avi 2\n", "line 1: file '../../v.avi'"),
        ("trainlist01.txt", "YoYo 2\n", "line 1: file ''"),
        ("trainlist01.txt", "YoYo/v.avi 2\nYoYo/v.avi 2\n", "'YoYo/v' occurs twice .lines 1 and 2"),
        ("testlist01.txt", "YoYo/v.avi 1\n", "line 1: YoYo has number 1; expected 2"),
    ],
)
def test_a_malformed_ucf101_file_is_refused_by_line(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    path = put(lay_out(tmp_path, ucf_files()) / "ucfTrainTestlist" / name, text)
    with pytest.raises(UsageError, match=message) as caught:
        read("ucf101", tmp_path)
    assert str(path) in str(caught.value)
    assert "expected" in str(caught.value)


# HMDB51


def hmdb_files(folder: str = "testTrainMulti_7030_splits") -> dict[str, str]:
    return {
        f"{folder}/{name}_test_split{fold}.txt": f"{name}_a.avi 1 \n{name} (b)#20.avi {fold % 3} \n{name}_c.avi 2 \n"
        for name in ("wave", "brush_hair")
        for fold in (1, 2, 3)
    }


@pytest.mark.parametrize("base", ["hmdb51_org/", "videos/", ""])
def test_hmdb51_reads_codes_of_each_fold(base: str, tmp_path: Path) -> None:
    root = lay_out(tmp_path, hmdb_files())
    for name in ("brush_hair", "wave"):
        for file in ("_a", " (b)#20", "_c"):
            put(root / f"{base}{name}/{name}{file}.avi")
    first, second, third = (read("hmdb51", root, split=fold) for fold in ("1", "2", "3"))
    train_a = ["brush_hair/brush_hair_a", "wave/wave_a"]
    b = {"brush_hair/brush_hair (b)#20", "wave/wave (b)#20"}
    assert set(ids_of(first["train"])) == {*train_a, *b}
    assert set(ids_of(second["val"])) == {"brush_hair/brush_hair_c", "wave/wave_c", *b}
    assert list(ids_of(third["train"])) == train_a  # code 0 is in neither
    assert len(third["val"].clips) == 2
    assert first["train"].classes == ("brush_hair", "wave")
    assert labels_of(third["train"]) == [0, 1]
    assert paths_of(third["train"]) == [f"{base}{clip_id}.avi" for clip_id in train_a]
    for clips in (*first.values(), *second.values(), *third.values()):
        assert missing_clips(clips, root) == []


def test_a_class_without_its_file_of_the_fold_is_refused(tmp_path: Path) -> None:
    root = lay_out(tmp_path, hmdb_files())
    (root / "testTrainMulti_7030_splits" / "brush_hair_test_split2.txt").unlink()
    assert len(read("hmdb51", root)["train"].classes) == 2
    with pytest.raises(UsageError, match=r"no brush_hair_test_split2\.txt"):
        read("hmdb51", root, split="2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.avi 1\nb.avi 3\n", "line 2: 'b.avi 3'; expected lines"),
        ("a.avi\n", "line 1: 'a.avi'"),
        ("1\n", "line 1: '1'"),
        ("../a.avi 1\n", "line 1: '../a.avi 1'"),
        ("a.avi 1\na.avi 2\n", "line 2: 'a.avi' is on line 1 already"),
        ("", "line 1: the file is empty"),
    ],
)
def test_a_malformed_hmdb51_file_is_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    root = lay_out(tmp_path, hmdb_files("annotations"))
    path = put(root / "annotations" / "wave_test_split1.txt", text)
    with pytest.raises(UsageError, match=message) as caught:
        read("hmdb51", root)
    assert str(path) in str(caught.value)
    assert "expected" in str(caught.value)


# Folder and list


def test_a_folder_is_its_splits_or_the_one_named(tmp_path: Path) -> None:
    divided = lay_out(tmp_path / "a", {f"{s}/{c}/x.mp4": "" for s in ("train", "val", "test") for c in "pq"})
    assert list(read("folder", divided)) == ["train", "val"]
    assert paths_of(read("folder", divided, split="test")["test"]) == ["test/p/x.mp4", "test/q/x.mp4"]
    plain = lay_out(tmp_path / "b", {"p/x.mp4": "", "q/x.mp4": ""})
    assert list(read("folder", plain)) == ["all"]
    assert [clip.split for clip in read("folder", plain, split="train")["train"].clips] == ["train", "train"]
    no_val = lay_out(tmp_path / "c", {"train/p/x.mp4": "", "test/p/x.mp4": ""})
    assert sorted(read("folder", no_val)) == ["test", "train"]
    with pytest.raises(UsageError, match="no folder of split val"):
        read("folder", no_val, split="val")


def test_a_list_keeps_paths_and_labels(tmp_path: Path) -> None:
    path = put(tmp_path / "list.txt", "\ufeffa dir/x 1.mp4 3\r\nsub/y.avi 0\r\n")
    lists = read("list", tmp_path, list_path=path, split="validation")
    assert paths_of(lists["val"]) == ["a dir/x 1.mp4", "sub/y.avi"]
    assert labels_of(lists["val"]) == [3, 0]
    assert list(read("list", tmp_path, list_path=path)) == ["all"]


def test_a_list_of_frame_folders_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "list.txt", "some/folder 299 1\nother/folder 300 0\n")
    with pytest.raises(
        UsageError, match=r"list\.txt, line 1: 'some/folder 299 1' looks like a folder of frames"
    ):
        read("list", tmp_path, list_path=path)


def test_options_of_other_data_sets_are_refused(tmp_path: Path) -> None:
    some = put(tmp_path / "list.txt", "x.mp4 0\n")
    for name in set(DATASETS) - {"list"}:
        with pytest.raises(UsageError, match=f"--list .* with --dataset {name}"):
            read(name, tmp_path, list_path=some)
    with pytest.raises(UsageError, match="--dataset list with no --list"):
        read("list", tmp_path)
    with pytest.raises(UsageError, match=r"--annotations .* with --dataset folder"):
        read("folder", tmp_path, annotations=some)


def test_every_data_set_has_a_description_that_names_its_files() -> None:
    assert sorted(DATASETS) == sorted("k400 k600 k700 ssv2 ucf101 hmdb51 scenes motions folder list".split())
    for name, words in {
        "k400": "train.csv val.csv youtube_id EVL_DATA_ROOT/k400",
        "k700": "Kinetics-700 kinetics700_train.csv",
        "ssv2": "something-something-v2-labels.json .webm",
        "ucf101": "classInd.txt trainlist01.txt",
        "hmdb51": "_test_split1.txt",
        "folder": "<class>/<video>",
        "list": "--list",
        "scenes": "train/<class>/<index>.mp4 EVL_DATA_ROOT/scenes",
        "motions": "evl-cache render motions",
    }.items():
        assert DATASETS[name].name == name
        assert all(word in DATASETS[name].description for word in words.split())
        assert "{n}" not in DATASETS[name].description


# Missing files


def clip_list(paths: list[str]) -> ClipList:
    clips = tuple(Clip(id=path, path=path, label=0, split="train", line=i) for i, path in enumerate(paths, 2))
    return ClipList(clips=clips, classes=("a",), source="list.txt")


def test_missing_clips_agree_with_asking_for_each_file(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "root", {"a/x.mp4": "", "a/y.mp4": "", "top.mp4": "", "b c/z.mp4": ""})
    (root / "a" / "folder.mp4").mkdir()
    os.symlink(root / "a" / "x.mp4", root / "link.mp4")
    os.symlink(root / "nowhere", root / "dangling.mp4")
    os.symlink("circle.mp4", root / "circle.mp4")
    outside = put(tmp_path / "outside" / "o.mp4")
    names = (
        "a/x.mp4 a/n.mp4 a/folder.mp4 top.mp4 link.mp4 dangling.mp4 circle.mp4 no/x.mp4 top.mp4/x.mp4".split()
    )
    clips = clip_list([*names, "b c/z.mp4", "a/../a/y.mp4", str(outside), str(outside) + "x"])
    missing = missing_clips(clips, root)
    assert missing == naively_missing(clips, root)
    assert len(missing) == 7


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{folder}/{i}.mp4": "" for folder in "abc" for i in range(10)}
    lay_out(tmp_path, files)
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    assert missing_clips(clip_list(sorted(files)), tmp_path) == []
    assert sorted(listed) == [str(tmp_path / folder) for folder in "abc"]


def test_missing_clips_are_counted_listed_and_allowed_by_share(tmp_path: Path) -> None:
    lay_out(tmp_path, {f"{i}.mp4": "" for i in range(12)})
    clips = clip_list([f"{i}.mp4" for i in range(16)])  # 4 of 16 = 25 %
    with pytest.raises(UsageError) as caught:
        check_missing(clips, tmp_path, allow_percent=24.9)
    assert str(caught.value) == (
        f"list.txt: 4 of 16 clips (25 %) are missing under {tmp_path}: 12.mp4 (line 14), 13.mp4 (line 15), "
        "14.mp4 (line 16) and 1 more; expected at most 24.9 %; fetch them, or go on without them by "
        "--allow-missing 25"
    )
    assert check_missing(clips, tmp_path, allow_percent=25) == missing_clips(clips, tmp_path)


def test_the_share_that_the_error_offers_is_enough(tmp_path: Path) -> None:
    lay_out(tmp_path, {f"{i}.mp4": "" for i in range(2)})
    clips = clip_list([f"{i}.mp4" for i in range(3)])  # 33.33… %
    with pytest.raises(UsageError, match=r"--allow-missing 33\.34") as caught:
        check_missing(clips, tmp_path, allow_percent=0)
    offered = float(str(caught.value).rsplit(" ", 1)[1])
    assert len(check_missing(clips, tmp_path, allow_percent=offered)) == 1


def test_where_everything_is_missing_the_root_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"2 of 2 clips \(100 %\).*as --root"):
        check_missing(clip_list(["x.mp4", "y.mp4"]), tmp_path, allow_percent=50)


@pytest.mark.parametrize("percent", [-1, 101, float("nan")])
def test_a_share_that_is_no_percentage_is_refused(percent: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a percentage from 0 to 100"):
        check_missing(clip_list(["x.mp4"]), tmp_path, allow_percent=percent)
