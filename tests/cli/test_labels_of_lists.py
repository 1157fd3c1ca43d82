"""Lists and labels as people have them, from extract to a score: the cases of tests/fixtures/lists, as typed."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evl_cache import EVLHead
from evl_cache.datasets.list_lines import parse_list
from evl_cache.errors import UsageError
from evl_cache_cli.main import main
from tests.support.example_data import ROOT

LISTS = ROOT / "tests" / "fixtures" / "lists"
TINY = "--model evl-tiny --layers 5-8 --frames 4 --stride 2 --device cpu".split()
# How the official code calls what a head's parameters are called here.
OFFICIAL_NAMES = (
    (r"class_query", "decoder.cls_token"),
    (r"layers\.(\d+)\.conv\.", r"decoder.temporal_conv.\1."),
    (r"layers\.(\d+)\.pos_embed", r"decoder.temporal_pos_embed.\1"),
    (r"layers\.(\d+)\.motion_prev", r"decoder.cross_attention.\1.w1"),
    (r"layers\.(\d+)\.motion_next", r"decoder.cross_attention.\1.w2"),
    (r"layers\.(\d+)\.(\w_proj|out_proj)\.", r"decoder.decoder_layers.\1.attn.\2."),
    (r"layers\.(\d+)\.(fc\d)\.", r"decoder.decoder_layers.\1.mlp.\2."),
    (r"layers\.(\d+)\.", r"decoder.decoder_layers.\1."),
    (r"norm\.", "proj.0."),
    (r"classifier\.", "proj.2."),
)
Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The case's name; its lists and videos are in the working directory, and caches go there."""
    name: str = request.param
    shutil.copytree(LISTS / name, tmp_path, dirs_exist_ok=True)
    shutil.copytree(LISTS / "v", tmp_path / "v")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVL_CACHE_ROOT", str(tmp_path / "caches"))
    return name


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], one_thread: None) -> Run:
    """Run a command line; gives exit status, stdout, stderr."""

    def call(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        assert isinstance(stop.value.code, int)
        return (stop.value.code, *capsys.readouterr())

    return call


def extract(run: Run, more: str) -> None:
    status, _, err = run(f"extract --dataset list --root v {' '.join(TINY)} {more}")
    assert status == 0, err


def save_checkpoint(path: str, classes: int) -> None:
    """Save a head in the official layout that always says its first class."""
    torch.manual_seed(0)
    head = EVLHead(num_layers=4, width=192, num_frames=4, grid=(6, 6), num_classes=classes)
    tensors = {}
    for name, value in head.state_dict().items():
        pattern, official = next(pair for pair in OFFICIAL_NAMES if re.match(pair[0], name))
        tensors["module." + re.sub(f"^{pattern}", official, name)] = value
    tensors["module.proj.2.bias"][0] = 100.0
    torch.save({"model": tensors, "next_step": 1}, path)


@pytest.mark.parametrize("case", ["head-of-other-names"], indirect=True)
def test_an_imported_head_is_right_by_the_names_of_its_classes(case, run):
    save_checkpoint("o.pth", 3)
    assert run("import-head o.pth --out run --classes names.txt")[0] == 0
    extract(run, "--list l.txt --cache c")
    status, out, err = run("eval --cache c --run run --json --device cpu")
    assert status == 0, err
    found = json.loads(out)
    assert (found["top1"], found["val_clips"]) == (60.0, 5)
    assert "by number" not in err
    assert run("show --page page --cache c --run run --clips-each 1")[0] == 0
    page = Path("page/index.html").read_text()
    assert "walk (0.0 %), taken for run (100.0 %)" in page or "clap (0.0 %), taken for run" in page
    assert "run, found with 100.0 %" in page
    # Without names its numbers are compared, and that is told.
    assert run("import-head o.pth --out unnamed")[0] == 0
    status, out, err = run("eval --cache c --run unnamed --json --device cpu")
    assert (status, json.loads(out)["top1"]) == (0, 20.0)
    assert "note: unnamed: classes are compared by number" in err
    assert "by number" not in page
    assert run("show --page numbered --cache c --run unnamed --clips-each 1")[0] == 0
    assert "Classes are compared by number" in Path("numbered/index.html").read_text()


@pytest.mark.parametrize("case", ["head-of-other-names"], indirect=True)
def test_a_head_whose_classes_have_one_name_is_not_imported(case, run):
    save_checkpoint("o.pth", 3)
    Path("twice.txt").write_text("run\nwalk\nrun\n")
    status, out, err = run("import-head o.pth --out run --classes twice.txt")
    assert (status, out, err.count("\n")) == (2, "", 1) and "line 3: 'run' stands in line 1, too" in err
    assert not Path("run").exists()


@pytest.mark.parametrize("case", ["head-of-400"], indirect=True)
def test_a_head_of_400_classes_scores_a_list_of_numbers_below(case, run):
    save_checkpoint("k400.pth", 400)
    assert run("import-head k400.pth --out run")[0] == 0
    extract(run, "--list l.txt --cache c")
    status, out, err = run("eval --cache c --run run --json --device cpu")
    assert status == 0, err
    assert (json.loads(out)["top1"], json.loads(out)["val_clips"], err) == (0.0, 5, "")


@pytest.mark.parametrize("case", ["numbers-subset", "names-subset"], indirect=True)
def test_two_lists_whose_labels_differ_are_found_and_trained_on(case, run):
    extract(run, "--list train.txt --split train")
    extract(run, "--list val.txt --split val")
    status, _, err = run("train --dataset list --epochs 1 --device cpu --out run")
    assert status == 0, err
    classes = json.loads(Path("run/config.json").read_text())["classes"]
    scored = [line.split(",")[:2] for line in Path("run/scored.csv").read_text().splitlines()[1:]]
    if case == "numbers-subset":
        assert (classes, scored) == (["0", "1", "2", "3", "4"], [["5.mp4", "3"]])
    else:
        assert (classes, scored) == (["a", "b", "c"], [["3.mp4", "a"], ["4.mp4", "c"]])
    # Every later command means the same classes: eval of the validation cache, and the names that predict gives.
    (val,) = Path("caches").glob("list-val-*")
    top1 = json.loads(Path("run/result.json").read_text())["top1"]
    status, out, err = run(f"eval --cache {val} --run run --json --device cpu")
    assert (status, json.loads(out)["top1"]) == (0, top1), err
    videos = [f"v/{clip}" for clip, _ in scored]
    status, out, err = run(f"predict {' '.join(videos)} --run run --json --device cpu --topk 9")
    assert status == 0, err
    found = json.loads(out)["videos"]
    assert all({top["label"] for top in video["labels"]} == {*classes} for video in found)


@pytest.mark.parametrize("case", ["shared-clip"], indirect=True)
def test_a_clip_that_is_trained_on_and_scored_in_two_caches_is_told(case, run):
    for name, number in {"x": 0, "y": 1, "z": 2}.items():
        shutil.copy(f"v/{number}.mp4", f"v/{name}.mp4")
    for side in ("train", "val"):
        extract(run, f"--list {side}.txt --cache c-{side}")
    status, _, err = run("train --cache c-train --val-cache c-val --epochs 1 --out r --device cpu")
    assert status == 0, err
    assert "note: 1 of 2 clips to validate on are trained on too, by their names ('x.mp4')" in err
    # A cache of another list, scored later, is compared with the training cache where that is still there.
    status, out, err = run("eval --cache c-val --run r --json --device cpu")
    assert (status, json.loads(out)["clips_trained_on"]) == (0, 1)
    assert "note: r was trained on 1 of these 2 clips, by their names" in err
    Path("c-train").rename("away")
    status, out, err = run("eval --cache c-val --run r --json --device cpu")
    assert (status, json.loads(out)["clips_trained_on"], err) == (0, None, "")


@pytest.mark.parametrize(
    ("case", "message"),
    [("label-minus-one", "l.txt, line 1: label -1 is no class")],
    indirect=["case"],
)
def test_a_list_without_labels_is_refused_before_work(case, message, run):
    status, out, err = run(f"extract --dataset list --list l.txt --root v {' '.join(TINY)}")
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert not Path("caches").exists()


@pytest.mark.parametrize("case", ["labels-as-floats", "commas", "label-of-two-words"], indirect=True)
def test_lists_as_people_write_them_are_extracted(case, run):
    names = {"labels-as-floats": "abcd", "commas": ("my clip", "b c"), "label-of-two-words": "ab"}[case]
    for number, name in enumerate(names):
        shutil.copy(f"v/{number}.mp4", f"v/{name}.mp4")
    extract(run, "--list l.txt --cache c")
    rows = [json.loads(line) for line in Path("c/clips.jsonl").read_text().splitlines()]
    labels = {"labels-as-floats": [0, 1, 2, 10], "commas": [3, 1], "label-of-two-words": [1, 0]}[case]
    assert [row["label"] for row in rows] == labels
    assert [row["path"] for row in rows] == [f"{name}.mp4" for name in names]


@pytest.mark.parametrize("case", ["names-subset"], indirect=True)
def test_lists_extracted_with_one_file_of_classes_number_them_alike(case, run):
    Path("names.txt").write_text("c\nb\na\n")
    for side in ("train", "val"):
        extract(run, f"--list {side}.txt --split {side} --classes names.txt --cache c-{side}")
    labels = {
        row["path"]: row["label"]
        for side in ("train", "val")
        for row in map(json.loads, Path(f"c-{side}/clips.jsonl").read_text().splitlines())
    }
    assert labels == {"0.mp4": 2, "1.mp4": 1, "2.mp4": 0, "3.mp4": 2, "4.mp4": 0}
    status, _, err = run("train --cache c-train --val-cache c-val --epochs 1 --device cpu --out run")
    assert status == 0, err
    assert json.loads(Path("run/config.json").read_text())["classes"] == ["c", "b", "a"]
    status, out, err = run("extract --dataset folder --root v --classes names.txt")
    assert (status, out) == (2, "") and "--classes names.txt with --dataset folder" in err


@pytest.mark.parametrize("case", ["names-subset"], indirect=True)
def test_lists_whose_names_do_not_fit_are_told_of_the_file_of_classes(case, run):
    Path("val.txt").write_text("3.mp4 other\n4.mp4 c\n")
    for side in ("train", "val"):
        extract(run, f"--list {side}.txt --split {side} --cache c-{side}")
    status, _, err = run("train --cache c-train --val-cache c-val --epochs 1 --device cpu --out run")
    assert status == 2 and "there is no class 'other'" in err and "one --classes FILE" in err


@pytest.mark.parametrize("case", ["names-subset"], indirect=True)
def test_one_table_with_a_split_column_makes_two_caches_and_a_run(case, run):
    rows = ["b,train,0.mp4", "c,train,1.mp4", "a,val,2.mp4", "c,validation,3.mp4", "a,train,4.mp4"]
    Path("t.csv").write_text("\n".join(["class,split,video", *rows]))
    extract(run, "--list t.csv")
    status, _, err = run("train --dataset list --epochs 1 --device cpu --out run")
    assert status == 0, err
    scored = [line.split(",")[:2] for line in Path("run/scored.csv").read_text().splitlines()[1:]]
    assert scored == [["2.mp4", "a"], ["3.mp4", "c"]]
    shutil.rmtree(next(path for path in Path("caches").iterdir() if "val" in path.name))
    status, _, err = run("train --dataset list --epochs 1 --device cpu --out again")
    assert status == 2 and "--split val" in err and "t.csv" in err


def test_columns_of_numbers_before_the_last_word_are_no_part_of_a_path():
    with pytest.raises(UsageError, match="more than one word behind its path"):
        parse_list("0.mp4 0 0.5 train\n1.mp4 1 0.7 val\n", source="l.txt")
    assert [line.path for line in parse_list("my clip.001 3\n", source="l.txt")] == ["my clip.001"]
