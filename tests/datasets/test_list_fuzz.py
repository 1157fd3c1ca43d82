"""Random trees, lists and tables give the clips of an independent reader, or one line before a tower is built."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import pytest

from evl_cache.clips import ClipList
from evl_cache.datasets import DATASETS
from evl_cache.errors import UsageError
from evl_cache.extract import ExtractRequest, plan_extraction, request
from evl_cache.untrusted.json_text import parse_json
from evl_cache_cli.main import main
from tests.datasets.test_folder_walk import odd_tree, told
from tests.support.plain_folders import slow_walk
from tests.support.plain_lists import Refused, draw_case, plain_read

COUNT = 500


class TowerAskedForError(Exception):
    """What was asked for is understood."""


@pytest.fixture
def no_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*given: Any) -> NoReturn:
        raise TowerAskedForError

    monkeypatch.setattr(request, "build_tower", build)


def understood(asked: ExtractRequest) -> dict[str, ClipList] | None:
    """The clip lists of a request that comes as far as its tower; None of one that is refused in a line."""
    try:
        plan_extraction(asked, device="cpu")
    except UsageError as error:
        text = str(error)
        assert len(text.splitlines()) == 1 and "\x1b" not in text, text
        return None
    except TowerAskedForError:
        assert asked.root is not None
        return DATASETS[asked.dataset].read(
            asked.root, annotations=None, split=None, list_path=asked.list_path
        )
    raise AssertionError("a plan without a tower")


def rows_of(lists: dict[str, ClipList]) -> dict[str, list[tuple[Any, ...]]]:
    def row(found: ClipList, n: int) -> tuple[Any, ...]:
        clip = found.clips[n]
        part = clip.segment and (clip.segment.unit, clip.segment.start, clip.segment.end)
        return clip.id, clip.path, found.classes[clip.label], part

    return {split: [row(found, n) for n in range(len(found.clips))] for split, found in lists.items()}


def compare_list(folder: Path, seed: int) -> str:
    folder.mkdir()
    path = draw_case(folder, seed)
    found = understood(ExtractRequest(dataset="list", list_path=path, root=folder))
    try:
        expected = plain_read(path)
    except Refused:
        assert found is None, (seed, path.read_text())
        return f"{path.suffix} refused"
    assert found is not None and rows_of(found) == expected, (seed, path.read_text())
    assert len({clips.classes for clips in found.values()}) == 1
    return path.suffix


def compare_tree(folder: Path, seed: int) -> str:
    odd_tree(folder, seed)
    found = understood(ExtractRequest(dataset="folder", root=folder, allow_missing_percent=100))
    expected = slow_walk(folder)
    if found is None or expected is None:
        assert found is expected, seed
        return "tree refused"
    if "val" in expected:
        expected.pop("test", None)
    assert told(found) == expected, seed
    return "tree"


def compare(folder: Path, seeds: range) -> Counter[str]:
    """Every third case is a tree."""
    return Counter((compare_list if seed % 3 else compare_tree)(folder / str(seed), seed) for seed in seeds)


def test_trees_and_lists_are_read_as_the_obvious_way_does(tmp_path: Path, no_tower: None) -> None:
    kinds = compare(tmp_path, range(COUNT))
    assert {kind.split()[0] for kind in kinds} == {".txt", ".csv", ".jsonl", ".json", "tree"}
    assert all(count > COUNT / 100 for count in kinds.values()), kinds


@pytest.mark.soak
def test_many_more_trees_and_lists(tmp_path: Path, no_tower: None) -> None:
    compare(tmp_path, range(1000, 6000))


def test_the_command_tells_each_in_strict_json_or_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    statuses = Counter[int]()
    for seed in range(2000, 2040):
        folder = tmp_path / str(seed)
        folder.mkdir()
        words = ["--dataset", "list", "--list", str(draw_case(folder, seed)), "--root", str(folder)]
        with pytest.raises(SystemExit) as stop:
            main(["estimate", *words, "--model", "evl-tiny", "--device", "cpu", "--json"])
        out, err = capsys.readouterr()
        assert stop.value.code in (0, 2), (seed, err)
        if stop.value.code == 0:
            assert parse_json(out)["caches"] and json.loads(out), seed
        else:
            assert out == "" and len(err.splitlines()) == 1, (seed, err)
        statuses[stop.value.code] += 1
    assert min(statuses[0], statuses[2]) > 5, statuses
