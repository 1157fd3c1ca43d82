"""Verifying a cache: a sample of it, its index, what changes meanwhile, threads that end, and memory of many blocks."""

import json
import os
import shutil
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from evl_cache.canonical_json import signed_json
from evl_cache.errors import CacheDamaged, UsageError
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.repair import repair
from evl_cache.store import FeatureCache, Sample, read_clips, read_description, verify_cache
from evl_cache.store.disk.publish import stage_file
from evl_cache.store.format.layout import array_layouts
from evl_cache.store.format.manifest import manifest_content
from evl_cache.store.objects.workers import Stopped, Workers
from evl_cache.store.proving import files as files_module
from evl_cache.store.proving.manifest_text import proved_manifest
from evl_cache.store.proving.promises import Promises, read_mark_whole
from evl_cache.store.shards.shard_index import check_end
from evl_cache.store.writing.index_files import IndexWriter
from tests.support.feature_caches import cache_spec, clip_list, write_cache

BLOCKS = 20


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of many small blocks."""
    path = tmp_path_factory.mktemp("finished") / "cache"
    write_cache(path, labels=[0] * BLOCKS, block_clips=1, layers=(2,), maps="none")
    return path


@pytest.fixture
def cache(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def shard(cache: Path, block: int) -> Path:
    return array_layouts(read_description(cache).spec)["tokens"].shard(cache, block)


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards that were read."""
    found: list[Path] = []
    real = files_module.read_whole

    def read_whole(path: Path, **options: object) -> object:
        found.append(path)
        return real(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(files_module, "read_whole", read_whole)
    return found


@pytest.mark.parametrize(("percent", "blocks"), [(0.1, 1), (5, 1), (25, 5), (100, BLOCKS)])
def test_a_sample_reads_the_shards_of_so_many_blocks(
    finished: Path, read: list[Path], percent: float, blocks: int
) -> None:
    found = verify_cache(finished, sample=Sample(percent=percent))
    assert (found.sampled_blocks, found.blocks_done, found.problems) == (blocks, BLOCKS, ())
    arrays = len(array_layouts(read_description(finished).spec))
    assert len(read) == len(set(read)) == blocks * arrays
    assert found.cache_digest == FeatureCache(finished).fingerprint


def test_other_blocks_are_drawn_each_time_and_the_same_ones_by_a_seed() -> None:
    blocks = range(1000)
    drawn = [Sample(percent=5).draw(blocks) for _ in range(2)]
    assert drawn[0] != drawn[1] and drawn[0] == sorted(set(drawn[0]))
    again = [Sample(percent=5, seed=7).draw(blocks) for _ in range(2)]
    assert again[0] == again[1] != Sample(percent=5, seed=8).draw(blocks)
    assert Sample(percent=5).draw([]) == []


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.1, float("nan")])
def test_a_share_that_is_none_is_refused(percent: float) -> None:
    with pytest.raises(UsageError, match="expected more than 0 and at most 100"):
        Sample(percent=percent)


def test_damage_is_found_where_its_block_is_in_the_sample_and_only_there(cache: Path) -> None:
    spoil(shard(cache, 3))
    seeds = {Sample(percent=50, seed=seed).draw(range(BLOCKS)).count(3): seed for seed in range(20)}
    assert verify_cache(cache, sample=Sample(percent=50, seed=seeds[0])).problems == ()
    found = verify_cache(cache, sample=Sample(percent=50, seed=seeds[1]))
    assert [problem.block for problem in found.problems] == [3] and found.blocks_done == BLOCKS - 1


@pytest.mark.parametrize("name", ["done/000003.json", "manifest.json", "index.bin", "clips.jsonl"])
def test_a_sample_proves_marks_manifest_index_and_description_wholly(cache: Path, name: str) -> None:
    spoil(cache / name)
    assert verify_cache(cache, sample=Sample(percent=1, seed=0)).problems


def test_a_sample_looks_for_strays(cache: Path) -> None:
    (cache / "tokens" / "stray").touch()
    assert verify_cache(cache, sample=Sample(percent=1)).strays == ("tokens/stray",)


def test_a_missing_index_is_no_problem(cache: Path) -> None:
    (cache / "index.bin").unlink()
    assert verify_cache(cache).problems == ()


@pytest.mark.parametrize("at", [0, 100, 4095, 4096, 0.5, -1])
def test_an_index_that_differs_by_a_bit_is_a_problem_with_its_remedy(cache: Path, at: float) -> None:
    content = bytearray((cache / "index.bin").read_bytes())
    content[int(at * len(content)) if isinstance(at, float) else at] ^= 1
    (cache / "index.bin").write_bytes(content)
    (problem,) = verify_cache(cache).problems
    assert problem.block is None and "index.bin: " in problem.reason and "evl-cache index" in problem.reason


def test_bytes_behind_an_index_are_a_problem(cache: Path) -> None:
    with (cache / "index.bin").open("ab") as file:
        file.write(b"\0")
    (problem,) = verify_cache(cache).problems
    assert "evl-cache index" in problem.reason


def test_an_index_that_is_intact_and_of_this_manifest_but_not_what_the_marks_give_is_a_problem(
    cache: Path, tmp_path: Path
) -> None:
    """As only a writer of another kind would make it. Repair makes it again, as nothing in it is believed."""
    right, spec = (cache / "index.bin").read_bytes(), read_description(cache).spec
    with stage_file(cache) as staged:
        writer = IndexWriter(staged, spec, first=0)
        for block in range(BLOCKS):
            mark = read_mark_whole(cache, block, spec).mark
            assert mark is not None
            writer.add(replace(mark, clips=tuple(replace(clip, frame_size=(1, 1)) for clip in mark.clips)))
        writer.finish(
            cache_digest=FeatureCache(cache).fingerprint,
            labels=read_clips(cache, read_description(cache)).labels,
        )
        staged.publish_replacing(cache / "index.bin")
    (problem,) = verify_cache(cache).problems
    assert "is not what the marks give" in problem.reason
    result = repair(cache, tower=lambda description: pytest.fail("loaded"), options=ExtractOptions())
    assert result.is_complete and (cache / "index.bin").read_bytes() == right


def test_an_index_of_another_manifest_is_a_problem(cache: Path, tmp_path: Path) -> None:
    other = write_cache(
        tmp_path / "other", labels=[0] * BLOCKS, block_clips=1, layers=(2,), maps="none", seed=1
    )
    shutil.copy(other.path / "index.bin", cache / "index.bin")
    (problem,) = verify_cache(cache).problems
    assert "is not the index of this manifest" in problem.reason and "evl-cache index" in problem.reason


def test_a_link_is_no_index(cache: Path, tmp_path: Path) -> None:
    shutil.move(cache / "index.bin", tmp_path / "elsewhere")
    (cache / "index.bin").symlink_to(tmp_path / "elsewhere")
    (problem,) = verify_cache(cache).problems
    assert "cannot be read as an index" in problem.reason


def test_the_index_of_a_cache_that_is_done_again_is_no_problem(cache: Path) -> None:
    (cache / "done" / "000003.json").unlink()
    (cache / "manifest.json").unlink()
    assert verify_cache(cache).problems == ()


def test_a_block_that_is_done_again_during_the_look_is_compared_with_its_new_mark(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_cache(
        tmp_path / "other", labels=[0] * BLOCKS, block_clips=1, layers=(2,), maps="none", seed=1
    )
    for name in ("index.bin", "manifest.json"):
        (cache / name).unlink()
    real = files_module.ShardProof.read

    def redone(*arguments: object) -> Iterator[tuple[int, str]]:
        for layout in array_layouts(other.spec).values():
            shutil.copy(layout.shard(other.path, 3), layout.shard(cache, 3))
        shutil.copy(other.path / "done" / "000003.json", cache / "done" / "000003.json")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(files_module.ShardProof, "read", redone)
    found = verify_cache(cache)
    assert [problem.block for problem in found.problems] == [None]  # that there is no manifest
    assert found.blocks_done == BLOCKS


def test_a_mark_that_promises_what_no_file_can_be_is_damaged(cache: Path) -> None:
    path, spec = cache / "done" / "000003.json", read_description(cache).spec
    text = path.read_bytes().decode()
    sha256 = text.partition('"sha256":"')[2][:64]
    content = json.loads(text.replace(sha256, "x" * 64))
    del content["digest"]
    path.write_bytes(signed_json(content)[0])
    assert read_mark_whole(cache, 3, spec).mark is None
    assert [problem.block for problem in verify_cache(cache).problems] == [3]


def test_the_text_of_a_manifest_is_made_as_its_writer_makes_it(finished: Path) -> None:
    spec = read_description(finished).spec
    promises = Promises(spec)
    for block in range(BLOCKS):
        promises.admit(block, read_mark_whole(finished, block, spec).promise)
    written = (finished / "manifest.json").read_bytes()
    content, manifest = manifest_content(finished, spec, dict(promises.rows({})))
    assert content == written
    description = {
        name: digest for name, digest in manifest.files.items() if name not in dict(promises.rows({}))
    }
    assert proved_manifest(written, spec, promises.rows(description)) == manifest.digest
    for place in range(0, len(written), 97):
        other = bytearray(written)
        other[place] ^= 1
        assert proved_manifest(bytes(other), spec, promises.rows(description)) is None
    for other in (written[:-1], written + b"\n", written[:-1] + b" ", b""):
        assert proved_manifest(bytes(other), spec, promises.rows(description)) is None


def test_what_marks_promise_takes_little_memory_for_many_blocks() -> None:
    spec = cache_spec(clip_list([0] * 10, classes=3), block_clips=1)
    arrays, promises, count = len(array_layouts(spec)), Promises(spec), 2000
    tracemalloc.start()
    try:
        for block in range(count):
            promises.admit(block, block.to_bytes(8, "little") * 5 * (1 + arrays))
        rows = sum(1 for _ in promises.rows({}))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert rows == count * (1 + arrays)
    assert held < count * (60 * (1 + arrays) + 150)  # 40,000 blocks of seven files: 20 MB


def test_progress_counts_marks_and_then_all_bytes(finished: Path) -> None:
    told: list[tuple[str, int, int]] = []
    verify_cache(finished, on_progress=lambda *counts: told.append(counts))
    marks = [counts for counts in told if counts[0] == "marks"]
    assert marks == [("marks", done, BLOCKS) for done in range(1, BLOCKS + 1)]
    spec = read_description(finished).spec
    total = sum(
        layout.shard(finished, block).stat().st_size
        for layout in array_layouts(spec).values()
        for block in range(BLOCKS)
    )
    assert told[-1] == ("bytes", total, total)
    counted = [done for what, done, _ in told if what == "bytes"]
    assert counted == sorted(counted)


def test_what_is_interrupted_ends_with_its_threads(finished: Path) -> None:
    before = threading.active_count()

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "marks" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_cache(finished, threads=4, on_progress=interrupt)
    assert threading.active_count() == before


def test_threads_in_the_midst_of_a_file_end_at_its_next_part() -> None:
    begun = threading.Event()

    def work(item: int) -> None:
        while True:  # a file without end
            begun.set()
            workers.check()

    def interrupted() -> Iterator[int]:
        yield 0
        assert begun.wait(60)
        raise KeyboardInterrupt

    workers = Workers(2)
    with pytest.raises(KeyboardInterrupt), workers:
        next(workers.each(work, interrupted()))
    with pytest.raises(Stopped):
        workers.check()


def test_few_things_are_in_hand_at_a_time() -> None:
    taken = 0

    def many() -> Iterator[int]:
        nonlocal taken
        for item in range(10_000):
            taken += 1
            yield item

    with Workers(2) as workers:
        results = workers.each(lambda item: item, many())
        assert next(results) == 0
        assert taken <= workers.in_hand + 1


def test_each_shard_is_opened_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = os.open

    def watched(path: str, *arguments: object, **options: object) -> int:
        opened.append(os.fspath(path))
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", watched)
    verify_cache(finished)
    spec = read_description(finished).spec
    shards = {
        str(layout.shard(finished, block))
        for layout in array_layouts(spec).values()
        for block in range(BLOCKS)
    }
    assert sorted(path for path in opened if path in shards) == sorted(shards)


def test_a_shard_with_a_broken_index_is_found_though_its_mark_promises_it(tmp_path: Path) -> None:
    with pytest.raises(CacheDamaged, match="does not match its CRC-32C; verify and repair"):
        check_end(tmp_path / "shard", bytes(20 * 16 + 3) + b"x", 1000, 20)
    with pytest.raises(CacheDamaged, match="is cut off"):
        check_end(tmp_path / "shard", bytes(10), 10, 20)
