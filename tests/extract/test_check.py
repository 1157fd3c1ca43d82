"""`evl-cache check`: what is understood before any work, told in one screen, in JSON, and in short by `extract`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from evl_cache.caches.info import describe
from evl_cache.clips import Clip, Segment
from evl_cache.errors import TooManyFailures, UsageError, WorkerError
from evl_cache.extract import check as check_module
from evl_cache.extract import request as request_module
from evl_cache.extract import short_clips
from evl_cache.extract.failure_limit import DEFAULT_FROM_THE_START, FailureCount, FailureLimit
from evl_cache.extract.request import ExtractRequest
from evl_cache.extract.short_clips import look_for_short
from evl_cache.spec import ViewSpec
from evl_cache.store import ClipRecord
from evl_cache.video import Length
from evl_cache_cli.main import cli
from tests.support.example_data import ROOT, make_data
from tests.support.store_helpers import make_clips

TINY = ("--model", "evl-tiny", "--layers", "7-8", "--frames", "4")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of short clips, with a class and a clip amiss."""
    home = tmp_path_factory.mktemp("own")
    make_clips(home / "made", 6, broken=False)
    made = sorted((home / "made").glob("*.mp4"))
    for clip, where in zip(made, ("train/a", "train/a", "train/b", "val/a", "val/a", "train/b"), strict=True):
        (home / "d" / where).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, home / "d" / where / clip.name)
    (home / "d/train/a/notes.txt").touch()
    return home / "d"


def check(*words: str) -> Result:
    return CliRunner().invoke(cli, ["check", *words], terminal_width=80, standalone_mode=False)


def strict(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def told(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout, parse_constant=strict)
    return found


def test_a_screen_tells_what_was_understood_and_no_tower_is_built(
    clips: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(request_module, "build_tower", None)
    monkeypatch.setenv("EVL_CACHE_ROOT", str(tmp_path / "caches"))
    monkeypatch.chdir(clips.parent)
    result = check("--dataset", "folder", "--root", "d", *TINY)
    lines = result.stdout.splitlines()
    assert result.return_value == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80
    text = " ".join(result.stdout.split())
    for part in (
        "train: 4 clips of 2 classes",
        "classes a 2, b 2",
        "val: 2 clips of 2 classes (1 of them without a clip)",
        "passed over 1 file (1 .txt), no videos by their endings",
        "have fewer frames than a view lies over (49 = 16 x 3 + 1)",
        "--stride auto spreads each view over its clip",
        "classes with clips in train only (1): b",
    ):
        assert part in text, text
    assert lines[-1] == "extract would begin" and not (tmp_path / "caches").exists()


def test_json_is_strict_and_has_all_of_it(clips: Path) -> None:
    found = told(check("--dataset", "folder", "--root", str(clips), *TINY, "--json"))
    train, val = found["splits"]
    assert train["clips_by_class"] == {"a": 2, "b": 2} and val["clips_by_class"] == {"a": 2, "b": 0}
    assert train["short"]["short"] == train["short"]["clips"] == 4 and train["samples"] == 4
    assert found["would_begin"] and found["only_in"] == {"train": ["b"]} and found["in_both_total"] == 0
    assert 0 < train["expected_bytes"] <= train["raw_bytes"]


def test_sizes_are_those_that_estimate_tells(clips: Path) -> None:
    words = ["--dataset", "folder", "--root", str(clips), *TINY, "--json"]
    costs = told(CliRunner().invoke(cli, ["estimate", *words, "--device", "cpu"]))["caches"]
    for split, cost in zip(told(check(*words))["splits"], costs, strict=True):
        assert {name: split[name] for name in ("samples", "raw_bytes", "expected_bytes")} == {
            name: cost[name] for name in ("samples", "raw_bytes", "expected_bytes")
        }


def test_what_extract_would_refuse_is_status_1_and_what_cannot_be_read_is_2(
    clips: Path, tmp_path: Path
) -> None:
    (tmp_path / "l.txt").write_text("train/a/none.mp4 0\nval/a/none.mp4 1\n")
    words = ("--dataset", "list", "--list", str(tmp_path / "l.txt"), "--root", str(clips), *TINY)
    result = check(*words)
    assert result.return_value == 1 and "2 of 2 clips (100 %) are missing" in " ".join(result.stdout.split())
    assert result.stdout.splitlines()[-1] == "extract would refuse to begin"
    found = told(check(*words, "--json"))
    assert found["splits"][0]["missing"] == ["train/a/none.mp4", "val/a/none.mp4"]
    assert check(*words, "--allow-missing", "100").return_value == 0
    assert isinstance(check("--dataset", "list", "--list", "nowhere.txt").exception, UsageError)


def test_clips_in_both_splits_are_told(clips: Path, tmp_path: Path) -> None:
    shutil.copytree(clips, tmp_path / "d")
    one = next((tmp_path / "d/train/a").glob("*.mp4"))
    assert "two splits" not in check("--dataset", "folder", "--root", str(tmp_path / "d"), *TINY).stdout
    from evl_cache.extract.check import _in_both

    path = one.relative_to(tmp_path / "d").as_posix()
    both = [Clip(id=each, path=path, label=0, split=each) for each in ("train", "val")]
    assert _in_both({clip.split: [clip] for clip in both}, tmp_path / "d") == ["val"]


def test_extract_says_the_short_form_first_and_stdout_stays_json(clips: Path, tmp_path: Path) -> None:
    words = [
        "--dataset",
        "folder",
        "--root",
        str(clips),
        "--split",
        "train",
        *TINY,
        "--device",
        "cpu",
        "--json",
    ]
    result = CliRunner().invoke(cli, ["extract", *words, "--cache", str(tmp_path / "c")])
    said = result.stderr.splitlines()
    assert result.exit_code == 0 and told(result)["caches"]
    assert said[0] == "train: 4 clips of 2 classes: a, b"
    assert "passed over 1 file" in said[1] and "fewer frames than a view lies over" in said[2]
    assert "evl-tiny" in said[3]
    assert describe(tmp_path / "c", most_marks=9)["short_clips"] == 4
    auto = CliRunner().invoke(cli, ["extract", *words, "--stride", "auto", "--cache", str(tmp_path / "a")])
    assert auto.exit_code == 0 and "fewer frames" not in auto.stderr
    found = describe(tmp_path / "a", most_marks=9)
    assert found["short_clips"] == 0 and found["spec"]["views"]["stride"] == "auto"
    shown = CliRunner().invoke(cli, ["info", str(tmp_path / "c")]).stdout
    assert "short     4 of 4 clips" in shown
    assert "stride auto" in CliRunner().invoke(cli, ["info", str(tmp_path / "a")]).stdout


LIST = [Clip(id=str(n), path=f"{n}.mp4", label=0, split="all") for n in range(1000)]


def looked(
    monkeypatch: pytest.MonkeyPatch, lengths: dict[str, Length], clips: list[Clip], **views: Any
) -> short_clips.ShortClips | None:
    monkeypatch.setattr(short_clips, "_look", lambda asked, root: (lengths, {}))
    return look_for_short(clips, Path("."), ViewSpec(**views))


def test_the_stride_that_fits_nine_of_ten_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = {
        clip.path: Length(20 if row < 2 else 45 if row < 18 else 300, 25.0) for row, clip in enumerate(LIST)
    }
    found = looked(monkeypatch, lengths, LIST[:20])
    assert found is not None and found.short == 18 and found.fitting_stride == 6 and found.median == 45
    (told,) = found.told()
    assert told == (
        "18 of 20 clips have fewer frames than a view lies over (113 = 16 x 7 + 1): their views repeat the last frame; "
        "median 45 frames: --stride 6 fits nine of ten, --stride auto spreads each view over its clip"
    )
    assert sum(length.frames < 6 * 7 + 1 for length in list(lengths.values())[:20]) <= 2


def test_of_long_lists_200_spread_clips_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    found = looked(monkeypatch, {clip.path: Length(8, None) for clip in LIST}, LIST)
    assert found is not None and found.asked == found.looked_at == 200
    assert found.told()[0].startswith("200 of 200 clips looked at have fewer")
    assert looked(monkeypatch, {}, LIST, stride="auto") is None
    assert looked(monkeypatch, {}, LIST, stride=None, sampling="tsn") is None


@pytest.mark.parametrize(
    ("segment", "frames"),
    [
        (None, 100),
        (Segment(unit="frames", start=10, end=60), 50),
        (Segment(unit="frames", start=90, end=None), 10),
        (Segment(unit="seconds", start=1.0, end=3.0), 50),
        (Segment(unit="seconds", start=3.0, end=30.0), 25),
        (Segment(unit="seconds", start=30.0), 0),
        (Segment(unit="seconds", start=0.0, end=0.01), 1),
        (Segment(unit="seconds", start=0.01, end=0.04), 0),
    ],
)
def test_a_segment_has_frames_of_its_own(segment: Segment | None, frames: int | None) -> None:
    clip = Clip(id="a", path="a", label=0, split="all", segment=segment)
    assert short_clips._frames(clip, Length(100, 25.0)) == frames


def test_a_list_of_which_no_video_opens_is_told_before_the_work(tmp_path: Path) -> None:
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    found = look_for_short(LIST[:2], tmp_path, ViewSpec())
    assert found is not None and found.told()[0].startswith(
        "2 of 2 clips looked at cannot be opened, or hold no frame; the first: "
    )


def test_segments_that_hold_no_frame_are_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    beyond = replace(LIST[0], id="0#9-", segment=Segment(unit="seconds", start=9.0))
    found = looked(monkeypatch, {LIST[0].path: Length(150, 25.0)}, [LIST[0], beyond])
    assert found is not None and found.told() == [
        "1 of 2 clips looked at cannot be opened, or hold no frame; the first: 0#9-: the video has about 150 frames"
    ]


@pytest.mark.parametrize(("views", "is_told"), [("1x3", False), ("3x1", True)])
def test_views_over_time_that_are_nearly_the_same_are_told(tmp_path: Path, views: str, is_told: bool) -> None:
    (tmp_path / "l.txt").write_text("0.mp4 a\n")
    (tmp_path / "0.mp4").touch()
    asked = ExtractRequest(
        dataset="list", list_path=tmp_path / "l.txt", stride="auto", views=views, model="evl-tiny"
    )
    ((split, _),) = check_module.check(asked).splits
    assert any("nearly the same frames" in note for note in split.notes) is is_told


def test_a_clip_that_takes_too_long_to_look_at_is_not_told_as_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def length(pool: object, path: Path) -> Length:
        raise WorkerError("decoding took longer than 1 s")

    monkeypatch.setattr(short_clips.DecodePool, "length", length)
    found = look_for_short(LIST[:3], tmp_path, ViewSpec())
    assert found is not None and (found.looked_at, found.failed, found.told()) == (0, 0, [])


@pytest.mark.parametrize("percent", [200.0, -1.0, float("nan")])
def test_a_percentage_that_is_none_is_refused_by_check_too(tmp_path: Path, percent: float) -> None:
    (tmp_path / "l.txt").write_text("0.mp4 a\n")
    (tmp_path / "0.mp4").touch()
    asked = ExtractRequest(dataset="list", list_path=tmp_path / "l.txt", allow_missing_percent=percent)
    with pytest.raises(UsageError, match=r"--allow-missing .* expected a percentage"):
        check_module.check(asked)


def test_a_run_whose_first_clips_all_fail_ends_unless_a_limit_allows_it() -> None:
    failed = [ClipRecord(id=str(row), error="bad") for row in range(DEFAULT_FROM_THE_START)]
    FailureCount().after(failed[1:]).check_start()
    FailureCount().after([ClipRecord(id="x"), *failed]).check_start()
    FailureCount(limit=FailureLimit(percent=100.0)).after(failed).check_start()
    FailureCount(uncounted={clip.id for clip in failed}).after(failed).check_start()
    with pytest.raises(TooManyFailures, match=r"each of the first 20 clips failed; the last: bad; .*100%"):
        FailureCount().after(failed).check_start()


def test_a_run_of_bad_files_stops_after_twenty(tmp_path: Path) -> None:
    (tmp_path / "d/a").mkdir(parents=True)
    for row in range(60):
        (tmp_path / f"d/a/{row:02}.mp4").write_bytes(b"no video")
    words = ["--dataset", "folder", "--root", str(tmp_path / "d"), *TINY, "--device", "cpu"]
    result = CliRunner().invoke(cli, ["extract", *words, "--cache", str(tmp_path / "c")])
    assert isinstance(result.exception, TooManyFailures)
    assert "each of the first 20 clips failed" in str(result.exception)
    assert "60 of 60 clips looked at cannot be opened" in result.stderr
    on = CliRunner().invoke(
        cli,
        ["extract", *words, "--cache", str(tmp_path / "c"), "--max-failures", "100%"],
        standalone_mode=False,
    )
    assert on.return_value == 3 and "60 failed" in on.stdout


def test_the_screen_of_the_docs_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/own-videos.md").read_text(encoding="utf-8")
    screen = page.partition("evl-cache check ")[2].partition("```text\n")[2].partition("```")[0]
    assert check("--dataset", "list", "--list", "clips.txt", "--root", "videos").stdout == screen


def test_all_who_read_videos_say_what_they_understood(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVL_CACHE_ROOT", str(tmp_path / "caches"))
    words = ["--dataset", "folder", "--root", str(clips), *TINY, "--device", "cpu"]
    online = ["--online", "--head", "linear", "--steps", "1", "--batch", "2", "--out", str(tmp_path / "run")]
    said = []
    for command in (["extract"], ["estimate"], ["train", *online]):
        done = CliRunner().invoke(cli, [*command, *words], standalone_mode=False)
        assert done.exception is None, done
        lines = done.stderr.splitlines()
        said.append([line for line in lines if line.startswith(("train: 4", "val: 2", str(clips)))])
    assert said[0] == said[1] == said[2] and "passed over 1 file (1 .txt)" in said[0][1]
