"""The everyday cases of lists, folders, weights and words that once went wrong, by their names, each as its command line.

`ELSEWHERE` names the tests of those that have one already.
"""

import argparse
import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evl_cache.processes import available_bytes
from evl_cache.store import FeatureCache
from evl_cache.towers import build_tower
from evl_cache_cli.main import main
from tests.support.example_data import ROOT

VIDEOS = ROOT / "tests" / "fixtures" / "lists" / "v"
TINY = "--model evl-tiny --layers 7-8 --frames 4 --stride 2 --device cpu"
KINETICS = "label,youtube_id,time_start,time_end,split,is_cc\nabseiling,aaaaaaaaa0{},{},{},{},0\n"
MLP = "transformer.resblocks.5.mlp."
LABELS, WORDS = "tests/cli/test_labels_of_lists.py", "tests/cli/test_everyday_words.py"
ELSEWHERE = {
    **dict.fromkeys(
        ("numbers-subset", "names-subset"),
        (LABELS, "test_two_lists_whose_labels_differ_are_found_and_trained_on"),
    ),
    "label-minus-one": (LABELS, "test_a_list_without_labels_is_refused_before_work"),
    **dict.fromkeys(
        ("labels-as-floats", "commas", "label-of-two-words"),
        (LABELS, "test_lists_as_people_write_them_are_extracted"),
    ),
    "head-of-400": (LABELS, "test_a_head_of_400_classes_scores_a_list_of_numbers_below"),
    "head-of-other-names": (LABELS, "test_an_imported_head_is_right_by_the_names_of_its_classes"),
    "shared-clip": (LABELS, "test_a_clip_that_is_trained_on_and_scored_in_two_caches_is_told"),
    "odd-numbers": (WORDS, "test_an_odd_number_is_one_line_that_names_it"),
    "csv-and-json": (WORDS, "test_stdout_holds_one_format"),
    "repair-moved": (
        WORDS,
        "test_repair_of_a_cache_whose_videos_moved_asks_for_the_root_and_changes_nothing",
    ),
    "class-names": (
        "tests/cli/test_class_names.py",
        "test_report_and_show_tell_classes_apart_that_no_font_draws",
    ),
}
Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> Run:
    """Run a command line in an empty directory; gives exit status, stdout, stderr, which never hold a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVL_CACHE_ROOT", "caches")

    def call(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and "\x1b" not in out + err
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    return call


def lay(*paths: str) -> None:
    """Make videos of these paths, all others than the one before."""
    for number, path in enumerate(paths):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(VIDEOS / f"{number % 6}.mp4", path)


def caches() -> dict[str, FeatureCache]:
    """Return the caches that are there, by split."""
    opened = (FeatureCache(path) for path in sorted(Path("caches").iterdir()))
    return {cache.spec.split: cache for cache in opened}


def classes_of_splits() -> dict[str, tuple[str, ...]]:
    return {split: cache.spec.classes for split, cache in caches().items()}


def test_each_case_that_is_tested_elsewhere_is_there() -> None:
    for path, name in set(ELSEWHERE.values()):
        nodes = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("case", "splits"),
    [
        ("folder-annotations", ("train", "val")),
        ("folder-capitals", ("Train", "Test")),
        ("folder-validate", ("train", "validate")),
    ],
)
def test_folders_of_splits(run: Run, case: str, splits: tuple[str, str]) -> None:
    lay(*(f"d/{split}/{name}" for split in splits for name in ("a/1.mp4", "b/2.mp4")))
    if case == "folder-annotations":
        Path("d/annotations").mkdir()
        Path("d/annotations/x.csv").write_text("a,b\n")
    assert run(f"extract --dataset folder --root d {TINY}")[0] == 0
    second = "test" if case == "folder-capitals" else "val"
    assert classes_of_splits() == {"train": ("a", "b"), second: ("a", "b")}


def test_folder_one_level_up(run: Run) -> None:
    lay("d/set/train/a/1.mp4", "d/set/train/b/2.mp4", "d/set/val/a/3.mp4", "d/set/val/b/4.mp4")
    status, out, err = run(f"extract --dataset folder --root d {TINY}")
    assert (status, out, err.count("\n")) == (2, "", 1) and "give --root d/set" in err
    assert not Path("caches").exists()


def test_folder_flat_test(run: Run) -> None:
    lay("d/test/5.mp4", "d/train/a/1.mp4", "d/train/b/2.mp4", "d/val/a/3.mp4", "d/val/b/4.mp4")
    assert run(f"extract --dataset folder --root d --split train {TINY}")[0] == 0
    assert classes_of_splits() == {"train": ("a", "b")}


def test_endings(run: Run) -> None:
    odd = ("a.gif", "b.vob", "c.asf", "d.m2ts")
    lay("d/moving/e.gif", "d/other/f.mp4", "d/still/a.mp4", *(f"d/still/{name}" for name in odd))
    status, _, err = run(f"extract --dataset folder --root d {TINY}")
    assert status == 0 and [clip.id for clip in caches()["all"].clips] == ["other/f.mp4", "still/a.mp4"]
    assert "2 .gif, 1 .asf, 1 .m2ts, 1 .vob" in err and "take no number: moving" in err


@pytest.mark.parametrize(
    ("case", "times", "name"),
    [
        ("kinetics-float-times", ("59.0", "69.0"), "_000059_000069"),
        ("kinetics-by-id", ("59", "69"), ""),
    ],
)
def test_kinetics(run: Run, case: str, times: tuple[str, str], name: str) -> None:
    lay(f"k/train/aaaaaaaaa00{name}.mp4", f"k/val/aaaaaaaaa01{name}.mp4")
    Path("k/annotations").mkdir()
    for number, split in enumerate(("train", "val")):
        Path(f"k/annotations/{split}.csv").write_text(KINETICS.format(number, *times, split))
    assert run(f"extract --dataset k400 --root k {TINY}")[0] == 0
    ids = [[clip.id for clip in cache.clips] for cache in caches().values()]
    assert ids == [["aaaaaaaaa00_000059_000069"], ["aaaaaaaaa01_000059_000069"]], case
    assert not any(cache.failures for cache in caches().values())


def test_ucf101_spelling(run: Run) -> None:
    shutil.copytree(VIDEOS.parent / "ucf101-spelling" / "u", "u")
    assert run(f"extract --dataset ucf101 --root u {TINY}")[0] == 0
    assert [(len(cache.clips), cache.failures) for cache in caches().values()] == [(1, []), (1, [])]


@pytest.mark.parametrize("version", ["memory-v2-own-group", "memory-v1"])
def test_memory_of_a_job(tmp_path: Path, version: str) -> None:
    groups, job, v1 = tmp_path / "sys/fs/cgroup", "slurm/job_7", version == "memory-v1"
    own = (groups / "memory" / job) if v1 else (groups / job / "step_0")
    own.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"4:memory:/{job}\n0::/\n" if v1 else f"0::/{job}/step_0\n")
    for name, value in {
        ("memory.limit_in_bytes" if v1 else "memory.max"): "2147483648",
        ("memory.usage_in_bytes" if v1 else "memory.current"): "0",
        "memory.stat": "total_inactive_file 0" if v1 else "anon 0\nfile 0",
    }.items():
        (own / name).write_text(f"{value}\n")
    if v1:
        (groups / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    else:
        (groups / job / "memory.max").write_text("max\n")
    assert available_bytes(torch.device("cpu"), root=tmp_path) <= 2147483648


def saved(kind: str, state: dict[str, torch.Tensor]) -> Any:
    """Return what a weights file of this kind holds."""

    def behind(prefix: str, lacks: str = "") -> dict[str, torch.Tensor]:
        return {prefix + name: value for name, value in state.items() if name != lacks}

    if kind == "overflow":
        scale = {f"{MLP}c_fc.weight": 1e5, f"{MLP}c_fc.bias": 1e5, f"{MLP}c_proj.weight": 1e-5}
        return {name: value * scale.get(name, 1.0) for name, value in state.items()}
    return {
        "image_encoder": {"model": behind("module.image_encoder.")},
        "model.visual": {"state_dict": behind("model.visual.")},
        "_orig_mod.visual": behind("_orig_mod.visual."),
        "argparse": {"model": state, "args": argparse.Namespace(lr=1)},
        "head": {**state, "head.weight": torch.zeros(3, 3)},
        "lacks-behind-prefix": {"model": behind("module.image_encoder.", lacks=f"{MLP}c_fc.weight")},
    }[kind]


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[str], str]:
    """Save evl-tiny's weights as others save theirs, with two clips beside; gives the command that extracts with them."""
    state = {
        name: value.clone()
        for name, value in build_tower("evl-tiny", "rendered-v1").visual.state_dict().items()
    }

    def save(kind: str) -> str:
        torch.save(saved(kind, state), "w.pt")
        return f"extract --dataset folder --root d --pretrained w.pt {TINY}"

    return save


TOLD = {
    "image_encoder": "read from 'module.image_encoder.' in ['model']",
    "model.visual": "read from 'model.visual.' in ['state_dict']",
    "_orig_mod.visual": "read from '_orig_mod.visual.'",
    "argparse": "evl-tiny (w.pt)",
    "head": "left out head.weight: no part of the image tower evl-tiny",
}


@pytest.mark.parametrize("kind", TOLD)
def test_weights(
    run: Run, weights: Callable[[str], str], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    lay("d/a/1.mp4", "d/b/2.mp4")
    status, _, err = run(weights(kind))
    assert status == 0 and TOLD[kind] in err + caplog.text
    assert (
        caches()["all"].spec.tower.weights_sha256
        == build_tower("evl-tiny", "rendered-v1").spec.weights_sha256
    )


def test_weights_lacks_behind_prefix(run: Run, weights: Callable[[str], str]) -> None:
    lay("d/a/1.mp4", "d/b/2.mp4")
    status, out, err = run(weights("lacks-behind-prefix"))
    said, error = err.splitlines()
    assert (status, out, said) == (2, "", "all: 2 clips of 2 classes: a, b") and error.startswith("error: ")
    assert f"missing ['{MLP}c_fc.weight']" in err and "holds no image tower" not in err


def test_weights_overflow(run: Run, weights: Callable[[str], str]) -> None:
    lay(*(f"d/{'ab'[number % 2]}/{number}.mp4" for number in range(24)))
    command = weights("overflow")
    assert run(f"{command} --cache c32")[0] == 0 and not FeatureCache("c32").failures
    status, out, err = run(f"{command} --compute-dtype float16 --cache c16 --batch 4")
    assert (status, out) == (2, "") and "use --compute-dtype bfloat16" in err
    assert run("info c16 --failures --json")[1].count('"reason"') == 0, "no clip is blamed"


def test_name_not_utf8(run: Run) -> None:
    lay(*(f"d/a/g{number}.mp4" for number in range(5)), os.fsdecode(b"d/b/caf\xe9.mp4"))
    assert run(f"extract --dataset folder --root d {TINY} --cache c")[0] == 0
    assert not FeatureCache("c").failures
    trained = run("train --cache c --val-cache c --head linear --steps 1 --device cpu --out r")
    assert trained[0] == 0, trained[2]
    predict = "predict d --run r --device cpu"
    status, out, _ = run(predict)
    assert status == 0 and "caf\\xe9.mp4" in out
    assert run(f"{predict} --csv o.csv")[0] == 0
    assert Path("o.csv").read_text(encoding="utf-8").count("\n") == 1 + 6 * 2
    status, out, _ = run(f"{predict} --json")
    assert status == 0 and len(json.loads(out, parse_constant=pytest.fail)["videos"]) == 6
