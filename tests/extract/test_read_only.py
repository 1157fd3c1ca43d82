"""Caches on a read-only disk: what only reads works, and extraction that has nothing to do says so."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheError
from evl_cache.extract.finished import found_finished
from evl_cache.store import FeatureCache
from evl_cache.store.format.index_head import HEAD_NBYTES
from evl_cache.store.format.layout import mark_path
from evl_cache_cli.main import main
from tests.support.feature_caches import write_cache, write_pair
from tests.support.read_only import read_only
from tests.support.store_helpers import BROKEN, extract_small, load_clips, tree


@pytest.fixture(scope="module")
def finished(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache with one failed clip."""
    cache = tmp_path_factory.mktemp("finished") / "cache"
    extract_small(load_clips(motions), cache)
    return cache


@pytest.fixture
def cache(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def test_a_complete_cache_on_a_read_only_disk_is_extracted_again_with_nothing_to_do(
    motions: Path, cache: Path
) -> None:
    before, told = tree(cache), []
    with read_only(cache):
        result = extract_small(load_clips(motions), cache, on_clip=told.append)
    assert result.clips_done_here == 0 and result.clips == len(told) == 8 and sum(told) == 1
    assert [clip for clip, _ in result.failures] == [BROKEN]
    assert result.cache_digest == json.loads(before["manifest.json"])["digest"]
    assert tree(cache) == before


def test_without_its_directory_of_locks_too(motions: Path, cache: Path) -> None:
    shutil.rmtree(cache / "locks")
    with read_only(cache):
        assert extract_small(load_clips(motions), cache).clips_done_here == 0


def test_a_finished_cache_with_a_damaged_row_in_its_index_need_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write_cache(tmp_path / "cache")
    written = bytearray((cache.path / "index.bin").read_bytes())
    written[HEAD_NBYTES + 50] ^= 1
    (cache.path / "index.bin").unlink()
    (cache.path / "index.bin").write_bytes(written)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    job: Any = SimpleNamespace(cache_path=cache.path, spec=cache.spec)
    assert found_finished(job) is not None
    mark_path(cache.path, 1).unlink()
    assert found_finished(job) is None


@pytest.mark.parametrize("missing", ["manifest.json", "done/000001.json"])
def test_an_unfinished_cache_on_a_read_only_disk_is_an_error(
    missing: str, motions: Path, cache: Path
) -> None:
    (cache / missing).unlink()
    with read_only(cache), pytest.raises(CacheError, match=r"[Rr]ead-only"):
        extract_small(load_clips(motions), cache)


def test_a_mark_that_the_manifest_does_not_name_is_not_taken_for_done(motions: Path, cache: Path) -> None:
    mark = cache / "done" / "000001.json"
    content = json.loads(mark.read_bytes())
    mark.write_bytes(canonical_json(content | {"digest": "0" * 64}))
    with read_only(cache), pytest.raises(CacheError):
        extract_small(load_clips(motions), cache)


def test_failed_clips_are_not_tried_again_without_a_place_for_them(motions: Path, cache: Path) -> None:
    with read_only(cache), pytest.raises(CacheError, match=r"[Rr]ead-only"):
        extract_small(load_clips(motions), cache, retry_failed=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


@pytest.fixture
def shared(pair: Path) -> Iterator[Path]:
    with read_only(pair):
        yield pair


def test_commands_that_only_read_work_on_a_read_only_disk(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVL_CACHE_ROOT", str(shared))
    train, val = str(shared / "train"), str(shared / "val")
    for words in (
        ["info", train],
        ["info", train, "--failures"],
        ["info", train, "--watch"],
        ["ls"],
        ["ls", str(shared)],
        ["verify", train],
        ["card", train, "--print"],
        ["train", "--cache", train, "--val-cache", val, "--head", "linear", "--steps", "2", "--device", "cpu",
         "--out", str(tmp_path / "run")],
        ["eval", "--run", str(tmp_path / "run"), "--cache", val, "--device", "cpu"],
        ["push", train, str(tmp_path / "pushed")],
        ["pull", train, str(tmp_path / "part"), "--layers", "3-4"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, (words, capsys.readouterr().err)
    assert FeatureCache(tmp_path / "pushed").is_complete
    assert not os.access(shared / "train", os.W_OK)
