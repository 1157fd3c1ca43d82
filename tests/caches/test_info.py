"""What is told of the frames of a cache: by info, the card and ls, and where a head meets frames of another rule."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evl_cache.caches.card import cache_card
from evl_cache.caches.info import FramesFound
from evl_cache.caches.listing import list_caches
from evl_cache.extract.doubts import check_doubts
from evl_cache.extract.sources import check_sources
from evl_cache.live.run_tower import live_spec
from evl_cache.runs import frame_rules_differ, read_run_config
from evl_cache.spec import FRAME_RULE
from evl_cache_cli.main import cli
from tests.support.feature_caches import write_cache, write_pair

TRAIN = "--head linear --steps 1 --device cpu --batch 4".split()


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, words)))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ((FRAME_RULE, 0, 0, 0), f"all clips by rule {FRAME_RULE}"),
        ((1, 0, 0, 0), f"all clips by rule {FRAME_RULE}"),
        (
            (1, 9, 4, 5),
            f"of 9 clips chosen by rule 1, before rule {FRAME_RULE}: 4 doubtful by their kind of file, 5 can",
        ),
        ((FRAME_RULE + 1, 0, 0, 0), f"chosen by rule {FRAME_RULE + 1}, which this version does not know"),
    ],
)
def test_the_rule_of_frames_is_told_in_a_line(found: tuple[int, ...], told: str) -> None:
    rule, older, doubtful, untold = found
    frames = FramesFound(rule=rule, by_older_rule=older, doubtful=doubtful, untold=untold)
    assert frames.told().startswith(told)


def test_info_card_and_ls_tell_of_an_older_rule(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "old", frame_rule=1, failed=[2])
    out = invoke("info", cache.path).output
    assert "12 can be told only by the videos; see evl-cache verify --sources" in out
    assert json.loads(invoke("info", cache.path, "--json").output)["frames"]["by_older_rule"] == 12
    assert "frames: of 12 clips chosen by rule 1" in cache_card(cache)
    assert [found.frame_rule for found in list_caches([str(tmp_path)])] == [1]
    new = write_cache(tmp_path / "new")
    assert f"frames    all clips by rule {FRAME_RULE}\n" in invoke("info", new.path).output
    assert f"frames: all clips by rule {FRAME_RULE}" in cache_card(new)


def test_clips_whose_marks_do_not_say_of_what_video_they_are_cannot_be_examined(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "old", frame_rule=1, failed=[2])
    sources = check_sources(cache.path, cache.spec, cache.clips, tmp_path, prove=True)

    def doubt(path: Path, decoder: str) -> str | None:
        raise AssertionError(path)

    found = check_doubts(
        cache.path, cache.spec, cache.clips, tmp_path, sources=sources, doubt=doubt, threads=1
    )
    assert (len(found.untold), found.doubtful, found.cleared) == (12, {}, frozenset())
    assert found.told_of_untold is not None and "12 clips cannot be examined" in found.told_of_untold
    done = invoke("verify", cache.path, "--sources", "--root", tmp_path, "--json")
    assert len(json.loads(done.output)["sources"]) == 12


def test_a_run_of_one_rule_scored_on_a_cache_of_another_is_told_and_not_refused(tmp_path: Path) -> None:
    train, val = write_pair(tmp_path / "old", frame_rule=1)
    _, new = write_pair(tmp_path / "new")
    run = tmp_path / "run"
    done = invoke("train", "--cache", train.path, "--val-cache", val.path, "--out", run, *TRAIN)
    assert done.exit_code == 0 and "chosen by rule" not in done.output
    assert live_spec(read_run_config(run), run, num_clips=1).frame_rule == 1  # predict takes its run
    done = invoke("eval", "--cache", val.path, "--run", run, "--device", "cpu")
    assert done.exit_code == 0 and "chosen by rule" not in done.output
    done = invoke("eval", "--cache", new.path, "--run", run, "--device", "cpu")
    assert done.exit_code == 0
    assert f"note: {run} is of frames chosen by rule 1, {new.path} of frames chosen by rule 2" in done.stderr
    mixed = invoke(
        "train", "--cache", train.path, "--val-cache", new.path, "--out", tmp_path / "mixed", *TRAIN
    )
    assert mixed.exit_code == 0 and f"note: {train.path} is of frames chosen by rule 1" in mixed.stderr


def test_frames_of_one_rule_need_no_note() -> None:
    assert frame_rules_differ("a", 1, "b", 1) is None
    told = frame_rules_differ("a", 1, "b", 2)
    assert told is not None and "verify --sources" in told
