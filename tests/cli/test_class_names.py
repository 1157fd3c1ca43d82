"""Classes named in letters that the font has not, from folders to the pictures of a report."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from evl_cache import lettering
from evl_cache_cli.main import main
from tests.support.store_helpers import make_clips

TINY = "--model evl-tiny --layers 7-8 --frames 4 --stride 2 --device cpu".split()
CLASSES = ("عزف العود", "唱歌", "打鼓")


def status_of(*words: str) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return stopped.value.code


def test_report_and_show_tell_classes_apart_that_no_font_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_clips(tmp_path / "made", 6, broken=False)
    clips = sorted((tmp_path / "made").glob("*.mp4"))
    for place, clip in enumerate(clips[:6]):
        target = tmp_path / "d" / ("train", "val")[place % 2] / CLASSES[place // 2] / f"{place}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    monkeypatch.setattr(lettering, "_FAMILIES", {})
    lettering._tell_once.cache_clear()
    assert status_of("extract", "--dataset", "folder", "--root", "d", *TINY) == 0
    assert status_of(*"train --dataset folder --head linear --steps 2 --device cpu --out run".split()) == 0
    capfd.readouterr()
    assert status_of("report", "run", "--out", "page") == 0
    told = capfd.readouterr()
    assert "Glyph" not in told.err + told.out and "UserWarning" not in told.err
    page = Path("page/report.html").read_text(encoding="utf-8")
    assert re.search(r"Classes by number: #1 唱歌, #2 打鼓\.", page)
    val = next(path for path in Path("caches").glob("folder-val-*"))
    assert status_of("show", "val/唱歌/3.mp4", "--cache", str(val), "--run", "run", "--out", "a.png") == 0
    assert Path("a.png").stat().st_size > 1000 and "Glyph" not in capfd.readouterr().err
