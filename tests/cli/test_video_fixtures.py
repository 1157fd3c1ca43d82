"""The videos that people really have, through the commands: the same verdicts, the right frames, nothing said beside."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evl_cache.store import FeatureCache
from evl_cache_cli.main import main
from tests.support.example_data import DEMO_TOWER
from tests.support.fixture_videos import COLON, Expected, copy_fixture_videos, expected_of_all

ALL = {expected.name: expected for expected in expected_of_all()}
REFUSED = {name for name, expected in ALL.items() if expected.must_be_refused("centre")}
VIEWS = "--frames 8 --stride 4".split()


@dataclass(frozen=True)
class Ended:
    """What a command ended with, and what was written, also by libraries: to file descriptors 1 and 2."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What --json printed."""
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], world: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in the folder of the videos."""
    monkeypatch.chdir(world / "videos")

    def ended(*words: object) -> Ended:
        capfd.readouterr()
        status = run_here(*words)
        return Ended(status, *capfd.readouterr())

    return ended


def run_here(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The videos, a cache of them all, and a run on it; what extraction printed."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "videos").mkdir()
    copy_fixture_videos(folder / "videos")
    (folder / "list.txt").write_text("".join(f"{name} {at % 2}\n" for at, name in enumerate(ALL)))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("EVL_CACHE_")]:
            patch.delenv(name)
        patch.chdir(folder / "videos")
        words = "extract --dataset list --root . --pretrained none --max-failures 100% --layers 2-3 --device cpu".split()
        words += ["--list", str(folder / "list.txt"), "--model", str(DEMO_TOWER), *VIEWS]
        assert run_here(*words, "--cache", folder / "cache") == 3
        words = "--head linear --steps 2 --batch 4 --device cpu".split()
        cache = folder / "cache"
        assert run_here("train", "--cache", cache, "--val-cache", cache, "--out", folder / "run", *words) == 0
    return folder


def marks(world: Path) -> dict[str, dict[str, Any]]:
    blocks = [json.loads(path.read_text()) for path in sorted((world / "cache" / "done").glob("*.json"))]
    return {clip["id"]: clip for block in blocks for clip in block["clips"]}


def wrong_marks(world: Path) -> dict[str, str]:
    wrong = {}
    for name, mark in marks(world).items():
        expected: Expected = ALL[name]
        if mark["error"] is not None:
            if expected.accepted:
                wrong[name] = mark["error"]
        elif expected.accepted is False:
            wrong |= {name: "served"} if name in REFUSED else {}
        elif (mark["frame_count"], mark["indices"]) != (expected.frame_count, [expected.views["centre"][0]]):
            wrong[name] = f"{mark['frame_count']} frames, {mark['indices']}"
    return wrong


def test_extraction_marks_every_clip_as_it_must(world: Path) -> None:
    assert set(marks(world)) == set(ALL)
    assert wrong_marks(world) == {}
    assert {name for name, _ in FeatureCache(world / "cache").failures} >= REFUSED


def test_failures_name_their_file_once(world: Path) -> None:
    for name, reason in FeatureCache(world / "cache").failures:
        assert f"{name}: {name}" not in reason and reason.count(name) <= 1, reason


def test_predict_gives_the_verdicts_of_extraction_and_goes_on(run: Any, world: Path) -> None:
    ended = run("predict", *sorted(ALL), "--run", world / "run", "--device", "cpu", "--json")
    assert ended.status == 3
    failed = {name for name, mark in marks(world).items() if mark["error"] is not None}
    assert {Path(each["video"]).name for each in ended.json["failures"]} == failed
    assert "@ 0x" not in ended.out + ended.err  # a decoder's own line
    assert "video_reader.cc" not in ended.err


@pytest.mark.parametrize("name", ["c25_open0.mp4", "c12_short.avi", COLON])
def test_show_draws_a_healthy_video(run: Any, world: Path, tmp_path: Path, name: str) -> None:
    ended = run("show", name, "--run", world / "run", "--out", tmp_path / "shown.png", "--device", "cpu")
    assert ended.status == 0, ended
    assert (tmp_path / "shown.png").stat().st_size > 1000
    assert "@ 0x" not in ended.out + ended.err


def test_show_refuses_a_damaged_video_in_one_line(run: Any, world: Path, tmp_path: Path) -> None:
    words = ("--run", world / "run", "--out", tmp_path / "shown.png", "--device", "cpu")
    ended = run("show", "c03_flip12.mp4", *words)
    assert ended.status != 0
    told = (ended.out + ended.err).strip().splitlines()
    assert len(told) == 1 and told[0].count("c03_flip12.mp4") == 1
    assert not (tmp_path / "shown.png").exists()
