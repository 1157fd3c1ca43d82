"""Public functions take a place as a string wherever they take a Path."""

import os
from pathlib import Path

import pytest

from evl_cache import FeatureCache, load_head
from evl_cache.extract import ExtractRequest
from evl_cache.report.data import gather
from evl_cache.report.page import write_report_page
from evl_cache.runs import load_state, read_run_config
from evl_cache.runs.evaluate import evaluate
from evl_cache.runs.import_head import import_head
from evl_cache.show.page import show_page
from evl_cache.show.view import ShowRun, show_cached
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.sweep.stage import read_sweep
from evl_cache.train import TrainOptions, train
from tests.conftest import ROOT
from tests.support.feature_caches import write_pair

pytestmark = pytest.mark.usefixtures("one_thread")
OFFICIAL = ROOT / "tests" / "fixtures" / "evl_reference" / "official_layout_checkpoint.pth"


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FeatureCache, FeatureCache]:
    monkeypatch.chdir(tmp_path)
    return write_pair(tmp_path)


def test_runs_sweeps_reports_and_pictures(caches: tuple[FeatureCache, FeatureCache]) -> None:
    options = TrainOptions(head="decoder1", steps=1, batch=4)
    train(*caches, options=options, out="runs/x")
    train(*caches, options=options, out="runs/x", resume=True)
    assert evaluate("runs/x", caches[1]).val_clips == 5
    assert read_run_config("runs/x").head == "decoder1" and load_head("runs/x") and load_state("runs/x")
    sweep(*caches, runs=expand([{"head": ["linear"], "steps": [1]}], {}), out="runs/sweep")
    assert len(read_sweep("runs/sweep").runs) == 1
    pytest.importorskip("matplotlib")
    assert write_report_page(gather(["runs/x", "runs/sweep"]), "page").page.is_file()
    show_cached(caches[1], "v0", "clip.png", run=ShowRun.read("runs/x"))
    assert show_page(ShowRun.read("runs/x"), caches[1], "clips", each=1).is_file()
    assert os.path.getsize("clip.png") > 0


def test_an_imported_head(tmp_path: Path) -> None:
    import_head(str(OFFICIAL), str(tmp_path / "official"))
    assert load_head(str(tmp_path / "official"))


def test_a_request_of_an_extraction() -> None:
    asked = ExtractRequest(
        dataset="list", list_path="a.txt", root="videos", annotations="b", cache="caches/a"
    )
    assert asked == ExtractRequest(
        dataset="list",
        list_path=Path("a.txt"),
        root=Path("videos"),
        annotations=Path("b"),
        cache=Path("caches/a"),
    )
    assert asked.origin(asked.root or Path())["root"] == str(Path("videos").absolute())
