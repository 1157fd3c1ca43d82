"""Published data sets as people have them: other capitals, times and brackets than the annotations say."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from evl_cache.clips import ClipList
from evl_cache.datasets import DATASETS, check_missing
from evl_cache.datasets.places import VideoTree
from evl_cache.errors import UsageError
from evl_cache_cli.main import cli

LISTS = Path(__file__).parents[1] / "fixtures" / "lists"
HEADER = "label,youtube_id,time_start,time_end,split,is_cc"


def read(name: str, root: Path, split: str | None = None) -> dict[str, ClipList]:
    return DATASETS[name].read(root, annotations=None, split=split, list_path=None)


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def table(*rows: str) -> str:
    return "\n".join([HEADER, *rows]) + "\n"


def paths(lists: dict[str, ClipList]) -> dict[str, list[str]]:
    return {split: [clip.path for clip in clips.clips] for split, clips in lists.items()}


# Kinetics


def kinetics(root: Path, start: str = "59", end: str = "69", *videos: str) -> Path:
    files = {
        "annotations/train.csv": table(f"abseiling,aaaaaaaaa00,{start},{end},train,0"),
        "annotations/val.csv": table(f"abseiling,aaaaaaaaa01,{start},{end},val,0"),
    }
    return put(root, files | dict.fromkeys(videos, ""))


@pytest.mark.parametrize(("start", "end"), [("59.0", "69.0"), ("59.", "69.000"), ("059", "69")])
def test_seconds_may_have_a_point_behind_them(start: str, end: str, tmp_path: Path) -> None:
    lists = read("k400", kinetics(tmp_path / "a", start, end))  # fixture kinetics-float-times
    plain = read("k400", kinetics(tmp_path / "b"))
    assert [clip.id for clip in lists["train"].clips] == ["aaaaaaaaa00_000059_000069"]
    assert lists["val"].content_id == plain["val"].content_id


@pytest.mark.parametrize("start", ["59.5", "5e1", ".0", "nan"])
def test_parts_of_a_second_are_refused(start: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a whole number of seconds"):
        read("k400", kinetics(tmp_path, start))


@pytest.mark.parametrize("name", ["aaaaaaaaa0{}", "aaaaaaaaa0{}_59_69"])
@pytest.mark.parametrize("folder", ["{}", "{}/abseiling", "."])
def test_a_file_named_by_its_id_alone_is_found(folder: str, name: str, tmp_path: Path) -> None:
    train = Path(folder.format("train")) / f"{name.format(0)}.mp4"  # fixture kinetics-by-id
    val = Path(folder.format("val")) / f"{name.format(1)}.mp4"
    root = kinetics(tmp_path, "59", "69", str(train), str(val))
    lists = read("k400", root)
    assert paths(lists) == {"train": [str(train)], "val": [str(val)]}
    assert [check_missing(clips, root, allow_percent=0) for clips in lists.values()] == [[], []]
    no_times = f"no times in the name, such as {train}; each is taken whole, as the seconds of its row"
    times = f"times in the name without leading zeros, such as {train}"
    assert lists["train"].remarks == (f"1 file has {times if '59' in name else no_times}",)


def test_the_published_name_is_taken_where_both_are_there(tmp_path: Path) -> None:
    whole = "train/aaaaaaaaa00_000059_000069.mp4"
    lists = read("k400", kinetics(tmp_path, "59", "69", whole, "train/aaaaaaaaa00.mp4"))
    assert paths(lists)["train"] == [whole] and not lists["train"].remarks


def test_the_name_with_times_is_nearer_than_the_id(tmp_path: Path) -> None:
    timed = "train/x/aaaaaaaaa00_59_69.mp4"
    assert paths(read("k400", kinetics(tmp_path, "59", "69", "train/aaaaaaaaa00.mp4", timed)))["train"] == [
        timed
    ]


def test_an_id_of_two_clips_is_no_clips_file_and_is_shown(tmp_path: Path) -> None:
    root = kinetics(tmp_path, "59", "69", "train/aaaaaaaaa00.mp4")
    put(root, {"annotations/val.csv": table("abseiling,aaaaaaaaa00,5,15,val,0")})
    lists = read("k400", root)
    for split, clips in lists.items():
        with pytest.raises(
            UsageError, match=r"but train/aaaaaaaaa00\.mp4 is: its name has no times"
        ) as caught:
            check_missing(clips, root, allow_percent=0)
        assert "--root" not in str(caught.value), split


@pytest.mark.parametrize(
    "other", [("val", "val.csv"), ("test", "test.csv"), ("test", "kinetics400_test.csv")], ids=str
)
@pytest.mark.parametrize("label", ["abseiling", ""])  # the test tables of some releases have no labels
def test_what_is_a_clips_file_does_not_depend_on_the_split_asked_for(
    other: tuple[str, str], label: str, tmp_path: Path
) -> None:
    root = kinetics(tmp_path, "59", "69", "train/aaaaaaaaa00.mp4")
    put(root, {f"annotations/{other[1]}": table(f"{label},aaaaaaaaa00,5,15,{other[0]},0")})
    assert paths(read("k400", root, "train")) == {"train": ["train/aaaaaaaaa00_000059_000069.mp4"]}


def test_a_table_of_another_split_is_not_read_where_no_file_is_named_by_its_id(tmp_path: Path) -> None:
    root = kinetics(tmp_path, "59", "69", "train/aaaaaaaaa00_59_69.mp4")
    put(root, {"annotations/val.csv": "no table"})
    assert paths(read("k400", root, "train")) == {"train": ["train/aaaaaaaaa00_59_69.mp4"]}


def test_folders_of_splits_are_looked_for_once_however_many_clips_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(VideoTree, "folders_like", lambda self, folder, name: looked.append(name) or [])
    root = kinetics(tmp_path)
    put(root, {"annotations/train.csv": table(*(f"a,aaaaaaaaa00,{i},{i + 1},train,0" for i in range(500)))})
    assert len(read("k400", root, "train")["train"].clips) == 500
    assert len(looked) < 20


def test_folders_of_splits_may_have_capitals(tmp_path: Path) -> None:
    video = "Train/Abseiling/aaaaaaaaa00_000059_000069.mp4"
    assert paths(read("k400", kinetics(tmp_path, "59", "69", video)))["train"] == [video]


def test_a_text_file_with_more_lines_than_the_table_is_told(tmp_path: Path) -> None:
    root = put(
        kinetics(tmp_path), {"annotations/train_list.txt": "a 0\nb 1\nc 2\n", "annotations/val.txt": "a 0\n"}
    )
    lists = read("k400", root)
    assert lists["train"].remarks == (
        "train_list.txt beside it has 3 lines, more than its 1 rows, and is not read",
    )
    assert lists["val"].remarks == ()


def test_annotations_in_a_text_file_are_named_where_there_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    path = put(tmp_path, {"annotations/kinetics400_train_list_videos.txt": "a 0\n"}) / "annotations"
    with pytest.raises(
        UsageError, match=r"train_list_videos\.txt is there, and is not read as one.*--dataset list"
    ) as caught:
        read("k400", tmp_path, "train")
    assert str(path) in str(caught.value)
    put(tmp_path / "x", {"annotations/Train.CSV": table()})
    with pytest.raises(UsageError, match=r"Train\.CSV is there, and is not read as one") as caught:
        read("k400", tmp_path / "x", "train")


# UCF101 and HMDB51


def test_ucf101s_own_spellings_are_found(tmp_path: Path) -> None:
    root = shutil.copytree(LISTS / "ucf101-spelling" / "u", tmp_path / "u")
    lists = read("ucf101", root)
    assert paths(lists) == {
        "train": ["UCF-101/HandStandPushups/v_HandStandPushups_g08_c01.avi"],
        "val": ["UCF-101/HandStandPushups/v_HandStandPushups_g01_c01.avi"],
    }
    assert lists["train"].classes == ("HandstandPushups",)
    assert lists["train"].clips[0].id == "HandstandPushups/v_HandStandPushups_g08_c01"
    assert [check_missing(clips, root, allow_percent=0) for clips in lists.values()] == [[], []]


@pytest.mark.parametrize("found", ["ucf-101/handstandpushups/V_a.AVI", "Videos/HandstandPushups/v_A.mp4"])
def test_capitals_do_not_hide_a_folder_or_a_file(found: str, tmp_path: Path) -> None:
    lists = "ucfTrainTestlist/"
    annotations = {f"{lists}classInd.txt": "1 HandstandPushups\n"}
    annotations[f"{lists}trainlist01.txt"] = "HandstandPushups/v_a.avi 1\n"
    assert paths(read("ucf101", put(tmp_path, annotations | {found: ""}), "train")) == {"train": [found]}


def test_names_that_are_exact_win_and_two_that_are_not_are_none(tmp_path: Path) -> None:
    put(tmp_path, {"annotations/wave_test_split1.txt": "a.avi 1\nB.avi 1\nc.avi 2\n"})
    put(tmp_path, dict.fromkeys(("Wave/a.avi", "wave/a.avi", "wave/b.avi", "Wave/C.avi", "Wave/c.AVI"), ""))
    lists = read("hmdb51", tmp_path)
    assert paths(lists) == {"train": ["wave/a.avi", "wave/b.avi"], "val": ["wave/c.avi"]}


# Something-Something v2


def something(labels: dict[str, str]) -> dict[str, str]:
    clips = [
        {"id": "1", "template": "Holding [something]"},
        {"id": "2", "template": "Moving [part] of [something]"},
    ]
    return {
        "labels/labels.json": json.dumps(labels, indent=0),
        "labels/train.json": json.dumps(clips),
        "Videos/1.webm": "",
        "Videos/2.webm": "",
    }


def test_brackets_in_the_labels_are_read_as_those_of_templates(tmp_path: Path) -> None:
    plain = {"Moving part of something": "0", "Holding something": "1"}
    bracketed = {"Moving [part] of [something]": "0", "Holding [something]": "1"}
    lists = [
        read("ssv2", put(tmp_path / str(i), something(labels)), "train")["train"]
        for i, labels in enumerate((plain, bracketed))
    ]
    assert lists[0].classes == lists[1].classes == tuple(plain)
    assert lists[0].content_id == lists[1].content_id
    assert [clip.path for clip in lists[1].clips] == ["Videos/1.webm", "Videos/2.webm"]


def test_a_label_with_and_without_brackets_is_refused(tmp_path: Path) -> None:
    labels = {"Holding something": "0", "Holding [something]": "1"}
    with pytest.raises(UsageError, match=r"line 3: 'Holding \[something\]' is the label .* there already"):
        read("ssv2", put(tmp_path, something(labels)), "train")


# The command


def extract(what: str) -> str:
    answer = CliRunner().invoke(cli, f"extract {what} --model evl-tiny --layers 1-2 --device cpu".split())
    return f"{answer.stderr}{answer.exception or ''}"


def test_files_are_counted_before_a_tower_is_built(tmp_path: Path) -> None:
    root = put(tmp_path, {"list.txt": "A/x.mp4 0\n", "a/x.mp4": ""})
    answer = CliRunner().invoke(
        cli, f"extract --dataset list --list {root}/list.txt --model no/such-tower --device cpu".split()
    )
    assert "A/x.mp4 is not there, but a/x.mp4 is: capitals differ" in str(answer.exception)


def test_extract_takes_clips_by_their_ids_and_tells_it(tmp_path: Path) -> None:
    root = kinetics(tmp_path, "59", "69", "train/aaaaaaaaa00.mp4")
    said = extract(f"--dataset k400 --root {root} --split train --cache {tmp_path}/cache")
    assert "1 file has no times in the name, such as train/aaaaaaaaa00.mp4" in said
    assert "missing" not in said
