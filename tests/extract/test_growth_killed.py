"""Jobs that die while a cache grows: what was there is read as before, and the same command again ends in the same bytes."""

import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from evl_cache.store import GROWN_NAME, FeatureCache, verify_cache
from tests.support.extraction_server import Server
from tests.support.store_helpers import differences, tree

KILLED = 8  # times, spread over the growth
BEFORE: dict[str, Any] = {"clips": 4, "spec": {"layers": [3]}}
AFTER: dict[str, Any] = {"clips": 7, "spec": {"layers": [2, 3]}, "grow": True}


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A cache before and after it grew, without a kill."""

    before: Path
    after: dict[str, bytes]
    changes: int


@pytest.fixture(scope="module")
def undisturbed(store_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("growth")
    store_server.run(folder / "before", **BEFORE)
    shutil.copytree(folder / "before", folder / "after")
    ended = store_server.run(folder / "after", **AFTER)
    assert ended.code == 0 and "error" not in ended.report
    assert verify_cache(folder / "after").problems == ()
    return Undisturbed(
        before=folder / "before", after=tree(folder / "after"), changes=ended.report["changes"]
    )


def is_whole(cache: Path, undisturbed: Undisturbed) -> None:
    """Readers see all of an addition or nothing, and what was there is there."""
    opened, before = FeatureCache(cache), FeatureCache(undisturbed.before)
    assert (opened.spec.layers, opened.spec.num_clips) in (((3,), 4), ((2, 3), 4), ((2, 3), 7))
    assert opened.is_complete
    opened.read(opened.is_valid)
    rows = [0, 1, 2, 3]
    assert torch.equal(opened.read(rows, layers=[3])[0][0], before.read(rows)[0][0])


@pytest.mark.parametrize("seed", range(KILLED))
def test_killed_while_it_grows(
    store_server: Server, undisturbed: Undisturbed, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    shutil.copytree(undisturbed.before, tmp_path / "cache")
    kill_at = 1 + int((seed + rng.random()) / KILLED * (undisturbed.changes - 1))
    ended = store_server.run(tmp_path / "cache", **AFTER, kill_at=kill_at, kill_after=rng.random() < 0.5)
    assert ended.code == -signal.SIGKILL
    is_whole(tmp_path / "cache", undisturbed)
    ended = store_server.run(tmp_path / "cache", **AFTER)
    assert ended.code == 0, ended
    assert differences(tree(tmp_path / "cache"), undisturbed.after) == []


@pytest.mark.parametrize("back", range(5))
def test_killed_while_readers_are_told(
    store_server: Server, undisturbed: Undisturbed, tmp_path: Path, back: int
) -> None:
    """The last changes are those of `grown.json`."""
    shutil.copytree(undisturbed.before, tmp_path / "cache")
    ended = store_server.run(tmp_path / "cache", **AFTER, kill_at=undisturbed.changes - back)
    assert ended.code == -signal.SIGKILL
    is_whole(tmp_path / "cache", undisturbed)
    assert store_server.run(tmp_path / "cache", **AFTER).code == 0
    assert differences(tree(tmp_path / "cache"), undisturbed.after) == []


def test_two_jobs_let_a_cache_grow_at_once(
    store_server: Server, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.before, tmp_path / "cache")
    pids = [store_server.start(tmp_path / "cache", **AFTER, clip_s=0.02) for _ in range(2)]
    ended = [store_server.wait(pid) for pid in pids]
    assert [(one.code, one.report.get("message")) for one in ended] == [(0, None)] * 2
    assert {one.report["digest"] for one in ended} == {FeatureCache(tmp_path / "cache").fingerprint}
    assert differences(tree(tmp_path / "cache"), undisturbed.after) == []


def test_what_an_older_version_reads_stays_as_it_was(undisturbed: Undisturbed) -> None:
    """It knows nothing of `grown.json`, and reads the files beside it."""
    before = tree(undisturbed.before)
    assert {name: undisturbed.after[name] for name in before} == before
    added = undisturbed.after.keys() - before.keys()
    assert GROWN_NAME in added
    assert {name.partition("/")[0] for name in added} == {GROWN_NAME, "additions"}
