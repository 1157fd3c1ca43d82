"""Thousands of schedules of deaths, pauses, slow disks and duplicate takers: every block done, none doubled, none lost.

The suite runs the first five hundred, `make soak` those after them. A failure names its seed:
`EVL_CACHE_SIMULATION=SEED pytest tests/extract/test_simulation.py` runs that schedule alone, and
`EVL_CACHE_SIMULATIONS=100000` so many of them.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evl_cache.extract.block_taker import BlockTaker
from evl_cache.store.disk import lock_files, locks, publish
from evl_cache.store.writing import leftovers, publication, staged_block
from evl_cache.store.writing.stored_rows import StoredRows
from tests.support.simulation import first_failure, simulate, simulate_redo
from tests.support.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = int(os.environ.get("EVL_CACHE_SIMULATIONS", "500"))
SOAK_SCHEDULES = 5500
FIRST = int(os.environ.get("EVL_CACHE_SIMULATION_FIRST", "0"))
PROCESSES = min(4, os.cpu_count() or 1)
MUTANT_SCHEDULES = 2000

# What dies in a simulation closes nothing.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.mark.parametrize(
    ("first", "count"),
    [(FIRST, SCHEDULES), pytest.param(FIRST + SCHEDULES, SOAK_SCHEDULES, marks=pytest.mark.soak)],
    ids=["suite", "soak"],
)
def test_every_block_is_done_none_doubled_none_lost_in_thousands_of_schedules(first: int, count: int) -> None:
    if alone := os.environ.get("EVL_CACHE_SIMULATION"):
        simulate(int(alone))
        return
    children = [
        subprocess.Popen(
            [warm_python(), "-m", "tests.support.simulation"]
            + [str(number) for number in (first + part, first + count, PROCESSES)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for part in range(PROCESSES)
    ]
    for child in children:
        told, _ = child.communicate(timeout=count)
        assert child.returncode == 0
        failed = json.loads(told)
        assert failed is None, f"EVL_CACHE_SIMULATION={failed[0]}: {failed[1]}"


def test_a_seed_gives_the_same_schedule_again() -> None:
    for seed in range(12):
        assert simulate(seed) == simulate(seed)


def test_the_schedules_are_no_idle_ones() -> None:
    """Else a simulation that meets no trouble would pass as one that overcomes it."""
    outcomes = [simulate(seed) for seed in range(1, 150) if seed % 8]
    assert sum(max(outcome.extracted.values()) > 1 for outcome in outcomes) > 20  # blocks begun twice
    assert not any(
        outcome.has_run_again for outcome in outcomes
    )  # needed for one schedule in hundreds, see there
    assert sum(outcome.steps for outcome in outcomes) / len(outcomes) > 100


# Rules that are broken on purpose: the simulation has to notice.


def _locks_exclude_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_name(path: Any, content: bytes) -> bool:
        temporary = lock_files.aside_name(path)
        lock_files._write_new(temporary, content)
        os.replace(temporary, path)
        return True

    monkeypatch.setattr(locks, "take_name", take_name)
    monkeypatch.setattr(locks.LockWatcher, "_take", lambda self, path: self._create(path))


def _locks_of_the_dead_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.LockWatcher, "_is_abandoned", lambda self, path, content: False)


def _a_lock_once_held_is_believed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.BlockLock, "is_held", lambda self: True)


def _what_was_written_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication.BlockPublication, "_written_lies_there", lambda self, *args: True)
    monkeypatch.setattr(publication.BlockPublication, "_lies_there", lambda self, records: True)


def _staged_files_of_all_blocks_are_taken_for_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "staged_block", lambda name: 0)
    monkeypatch.setattr(
        staged_block, "remove_leftovers", lambda directory, block: leftovers.remove_leftovers(directory)
    )


def _broken_marks_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication.BlockPublication, "_withdraw_if_broken", lambda self: None)


def _nothing_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        publish.StagedFile,
        "seal",
        lambda self: self._descriptor and (self._flush(self._descriptor), self._close()),
    )


def _the_mark_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    real = publication.BlockPublication._publish_block

    def publish_block(self: Any, mark: Any, content: Any, *files: Any) -> Any:
        self.publish_mark(mark, content)
        return real(self, mark, content, *files)

    monkeypatch.setattr(publication.BlockPublication, "_publish_block", publish_block)


def _a_redo_is_published_whatever_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication, "check_nothing_lost", lambda *args, **kwargs: None)
    monkeypatch.setattr(StoredRows, "is_intact", lambda self, row: False)


def _the_old_mark_goes_before_the_new_files_come(monkeypatch: pytest.MonkeyPatch) -> None:
    real = publication.BlockPublication._begin_redo

    def begin_redo(self: Any) -> None:
        real(self)
        os.unlink(self._mark_path)

    monkeypatch.setattr(publication.BlockPublication, "_begin_redo", begin_redo)


@pytest.mark.parametrize(
    ("mutate", "first"),  # first: as below
    [
        (_a_redo_is_published_whatever_it_lacks, 0),
        (_the_old_mark_goes_before_the_new_files_come, 10),
    ],
)
def test_a_broken_rule_of_redoes_is_noticed(
    mutate: Callable[[pytest.MonkeyPatch], None], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    assert first_failure(range(first, first + MUTANT_SCHEDULES), simulate_redo) is not None


def _lost_blocks_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockTaker, "_reopen", lambda self, blocks: False)
    monkeypatch.setattr(BlockTaker, "look_around", lambda self: self._todo.clear())


@pytest.mark.parametrize(
    ("mutate", "first"),  # first: a seed not long before one that notices, so that the search is short
    [
        (_locks_exclude_nobody, 0),
        (_locks_of_the_dead_stay, 0),
        (_a_lock_once_held_is_believed_in, 130),
        (_what_was_written_is_not_looked_at, 4350),
        (_staged_files_of_all_blocks_are_taken_for_leftovers, 760),
        (_broken_marks_are_left, 150),
        (_nothing_is_synced, 300),
        (_the_mark_comes_first, 0),
        (_lost_blocks_are_forgotten, 0),
    ],
)
def test_a_broken_rule_is_noticed(
    mutate: Callable[[pytest.MonkeyPatch], None], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    assert first_failure(range(first, first + MUTANT_SCHEDULES)) is not None
