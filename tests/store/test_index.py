"""The index of a cache: readers have of it what the marks give, and damage to it is found and never believed."""

import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evl_cache import FeatureCache
from evl_cache.errors import CacheDamaged
from evl_cache.spec import ViewSpec
from evl_cache.store import BlockNotDone, finish_cache, index_cache, read_clips, read_description
from evl_cache.store.format.index import believed_index, open_index
from evl_cache.store.format.index_head import HEAD_NBYTES
from evl_cache.store.format.layout import mark_path, redo_path
from evl_cache.store.format.marks import parse_mark
from evl_cache.store.proving.index_proof import IndexProof
from evl_cache.store.reading import blocks_done
from evl_cache.store.reading.blocks_done import BlocksDone
from evl_cache.store.writing import segments
from tests.support.feature_caches import write_cache
from tests.support.store_helpers import watched_changes

DAMAGES = 300
FAILED = (3, 7)


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def without_index(path: Path) -> FeatureCache:
    (path / "index.bin").unlink()
    return FeatureCache(path)


def told(cache: FeatureCache) -> dict[str, Any]:
    """All that a cache tells of its marks."""
    return {
        "valid": cache.is_valid.tolist(),
        "failures": cache.failures,
        "provenance": dict(cache.provenance),
        "older": dict(cache.by_older_rule),
        "labels": cache.labels.tolist(),
        "done": cache.num_blocks_done,
        "fingerprint": cache.fingerprint,
        "files": {block: cache._done.files[block] for block in sorted(cache._done.files)},
        "marks": cache._done.marks_digest,
    }


def values(cache: FeatureCache) -> list[bytes]:
    valid = np.flatnonzero(cache.is_valid)
    tokens, maps = cache.read(valid)
    return [each.numpy().tobytes() for each in (*tokens, *(maps or ()))]


def problem(path: Path, cache: FeatureCache) -> str | None:
    """What is wrong with an index, by all marks."""
    proof = IndexProof(path, cache.spec)
    for block in range(cache.spec.num_blocks):
        proof.add(parse_mark(mark_path(path, block).read_bytes(), "", block, cache.spec))
    return proof.problem(cache.fingerprint, read_clips(path, cache.description).labels)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "cache"
    write_cache(path, failed=FAILED)
    return path


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return copied(whole, tmp_path / "cache")


@pytest.mark.parametrize(
    "options", [{}, {"frame_rule": 1}, {"views": ViewSpec(frames=3, temporal_views=3)}, {"maps": "none"}]
)
def test_a_cache_is_the_same_by_its_index_and_by_its_marks(tmp_path: Path, options: dict[str, Any]) -> None:
    by_index = write_cache(tmp_path / "cache", failed=FAILED, **options)
    assert by_index._done.index is not None
    told_by_index, read_by_index = told(by_index), values(by_index)
    by_marks = without_index(tmp_path / "cache")
    assert by_marks._done.index is None
    assert (told(by_marks), values(by_marks)) == (told_by_index, read_by_index)


def test_a_complete_cache_opens_and_is_read_without_a_look_at_its_marks(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(cache / "done")
    monkeypatch.setattr(blocks_done, "marked_blocks", lambda path: pytest.fail("marks were listed"))
    opened = FeatureCache(cache)
    assert opened.is_complete and opened.has_manifest
    opened.check_marks(np.arange(len(opened)))
    assert len(values(opened)) == 6


def test_an_index_goes_to_other_processes(cache: Path) -> None:
    opened = FeatureCache(cache)
    again = pickle.loads(pickle.dumps(opened))
    assert again._done.index is not None and values(again) == values(opened)


def test_a_cache_of_another_version_has_no_index_until_it_is_made(cache: Path) -> None:
    before, digest = (cache / "index.bin").read_bytes(), FeatureCache(cache).fingerprint
    by_marks = without_index(cache)
    assert index_cache(cache, by_marks.spec) == digest
    assert (cache / "index.bin").read_bytes() == before


def test_a_cache_that_is_not_complete_gets_no_index(cache: Path) -> None:
    (cache / "manifest.json").unlink()
    with pytest.raises(BlockNotDone, match="not complete"):
        index_cache(cache, read_description(cache).spec)


def test_no_index_is_made_of_marks_that_the_manifest_does_not_name(cache: Path, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other", failed=FAILED, seed=5)
    shutil.copy(mark_path(other.path, 1), mark_path(cache, 1))
    with pytest.raises(CacheDamaged, match=r"not those that manifest\.json names"):
        index_cache(cache, other.spec)


def test_an_index_is_not_believed_beside_another_manifest_or_none(cache: Path, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other", failed=FAILED, seed=5)  # the same spec, other features
    spec = other.spec
    assert believed_index(cache, spec) is not None
    shutil.copy(other.path / "index.bin", cache / "index.bin")
    assert open_index(cache, spec) is not None and believed_index(cache, spec) is None
    expected = values(FeatureCache(cache))
    assert expected == values(without_index(cache)) != values(other)
    (other.path / "manifest.json").unlink()
    assert believed_index(other.path, spec) is None


def test_a_redo_of_a_block_ends_the_index_until_the_cache_is_finished_again(cache: Path) -> None:
    spec, before = read_description(cache).spec, (cache / "index.bin").read_bytes()
    redo_path(cache, 1).touch()
    (cache / "manifest.json").unlink()
    assert FeatureCache(cache)._done.index is None
    redo_path(cache, 1).unlink()
    finish_cache(cache, spec)
    assert (cache / "index.bin").read_bytes() == before and believed_index(cache, spec) is not None


def _flip(rng: random.Random, content: bytes, other: bytes) -> bytes:
    at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


def _cut(rng: random.Random, content: bytes, other: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def _longer(rng: random.Random, content: bytes, other: bytes) -> bytes:
    return content + rng.randbytes(rng.randrange(1, 5000))


def _overwrite(rng: random.Random, content: bytes, other: bytes) -> bytes:
    at, count = rng.randrange(len(content) - 1), rng.randrange(1, 400)
    return content[:at] + rng.randbytes(count)[: len(content) - at] + content[at + count :]


def _holes(rng: random.Random, content: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(content) // 512) * 512
    return content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :]


def _others(rng: random.Random, content: bytes, other: bytes) -> bytes:
    at = rng.choice([0, HEAD_NBYTES, rng.randrange(len(content))])
    return content[:at] + other[at:] if rng.random() < 0.5 else other[:at] + content[at:]


DAMAGE: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    _flip,
    _flip,
    _cut,
    _longer,
    _overwrite,
    _holes,
    _others,
)


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_index_is_found_never_believed_and_remade_to_the_byte(
    whole: Path, cache: Path, tmp_path: Path, part: int
) -> None:
    rng, good = random.Random(part), (cache / "index.bin").read_bytes()
    other = (write_cache(tmp_path / "other", failed=(1,), seed=5).path / "index.bin").read_bytes()
    opened = FeatureCache(cache)
    spec, expected, features = opened.spec, told(opened), values(opened)
    done = 0
    while done < DAMAGES // 4:
        damage = DAMAGE[done % len(DAMAGE)]
        bad = damage(rng, good, other)
        if bad == good:
            continue
        done += 1
        (cache / "index.bin").unlink()
        (cache / "index.bin").write_bytes(bad)
        what = f"{damage.__name__}, number {done} of seed {part}"
        found = FeatureCache(cache)
        assert (told(found), values(found)) == (expected, features), what
        assert problem(cache, found) is not None, what
        if done % 2:
            index_cache(cache, spec)
        else:
            finish_cache(cache, spec)
        assert (cache / "index.bin").read_bytes() == good, what


def test_an_intact_index_is_no_problem(cache: Path) -> None:
    assert problem(cache, FeatureCache(cache)) is None


def test_an_index_that_is_cut_off_while_it_is_open_ends_no_process(cache: Path) -> None:
    opened = FeatureCache(cache)
    expected = values(FeatureCache(cache))
    os.truncate(cache / "index.bin", HEAD_NBYTES)
    with pytest.raises(CacheDamaged, match="was cut off while it was open"):
        values(opened)
    assert values(FeatureCache(cache)) == expected  # by the marks


# Segments


@pytest.fixture
def growing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache as it was before its end, but for its last mark; segments have two blocks."""
    monkeypatch.setattr(segments, "SEGMENT_BLOCKS", 2)
    (cache / "manifest.json").unlink()
    (cache / "index.bin").unlink()
    return cache


def test_a_segment_is_written_once_all_its_blocks_are_done(growing: Path) -> None:
    spec = read_description(growing).spec
    hidden = growing / "hidden"
    mark_path(growing, 0).rename(hidden)
    assert not segments.write_segment_of(growing, spec, 1)
    hidden.rename(mark_path(growing, 0))
    assert segments.write_segment_of(growing, spec, 0)
    assert [path.name for path in (growing / "segments").iterdir()] == ["000000-000002.bin"]
    assert not segments.write_segment_of(growing, spec, 1)  # it is there


def test_blocks_of_a_segment_are_not_parsed_again_and_are_the_same(
    growing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, expected = read_description(growing).spec, told(FeatureCache(growing))
    features = values(FeatureCache(growing))
    segments.write_segment_of(growing, spec, 0)
    parsed, real = [], blocks_done.parse_mark
    monkeypatch.setattr(blocks_done, "parse_mark", lambda *args: (parsed.append(args[2]), real(*args))[1])
    found = FeatureCache(growing)
    assert (told(found), values(found)) == (expected, features) and parsed == [2]


def test_a_segment_of_a_mark_that_was_replaced_is_not_believed(growing: Path, tmp_path: Path) -> None:
    spec = read_description(growing).spec
    segments.write_segment_of(growing, spec, 0)
    other = write_cache(tmp_path / "other", failed=(0, 1), seed=5)
    shutil.copy(mark_path(other.path, 0), mark_path(growing, 0))
    done = BlocksDone(growing, spec)
    assert sorted(done.errors) == [0, 1, 7]
    assert done.files[0] == BlocksDone(other.path, spec).files[0]


def test_the_index_is_the_same_with_segments_and_without_and_they_go(growing: Path, whole: Path) -> None:
    spec = read_description(growing).spec
    segments.write_segment_of(growing, spec, 0)
    finish_cache(growing, spec)
    assert (growing / "index.bin").read_bytes() == (whole / "index.bin").read_bytes()
    assert not (growing / "segments").exists()


# Killed


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Whether a process that does some work was killed at this change of the disk."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def saw(name: str, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call()

        try:
            with watched_changes(saw):
                work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("name", ["finish_cache", "index_cache", "write_segment_of"])
def test_killed_at_any_change_of_writing_an_index_it_is_whole_or_not_there(
    name: str, whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BLOCKS", 2)
    spec, features = read_description(cache).spec, values(FeatureCache(whole))
    good = (whole / "index.bin").read_bytes()
    works: dict[str, Callable[[Path], Any]] = {
        "finish_cache": lambda path: finish_cache(path, spec),
        "index_cache": lambda path: index_cache(path, spec),
        "write_segment_of": lambda path: segments.write_segment_of(path, spec, 0),
    }
    (cache / "index.bin").unlink()
    if name != "index_cache":
        (cache / "manifest.json").unlink()
    number, was_killed = 0, True
    while was_killed:
        number += 1
        path = copied(cache, tmp_path / str(number))
        was_killed = killed_at(number, lambda path=path: works[name](path))
        found = FeatureCache(path)
        assert values(found) == features, number
        assert not (path / "index.bin").exists() or (path / "index.bin").read_bytes() == good
        finish_cache(path, spec, lock_expiry_s=0.2)
        assert (path / "index.bin").read_bytes() == good and believed_index(path, spec) is not None
        assert not list(path.glob("**/.tmp-*")) and not (path / "segments").exists()
        shutil.rmtree(path)
    assert number > 5
