"""Damage of every kind to every kind of file: found by `verify`, never served, and undone by `repair`."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.repair import RepairResult, repair
from evl_cache.store import CacheDescription, FeatureCache, restore_description, verify_cache
from evl_cache.store.reading import sample_reader
from evl_cache.store.writing.completion import write_manifest
from evl_cache.towers.tower import Tower
from tests.support.damage_kinds import KINDS, kind_of
from tests.support.store_helpers import (
    clear_mark,
    differences,
    extract_small,
    load_clips,
    make_clips,
    one_thread,
    small_spec,
    small_tower,
    tree,
)

DAMAGES = 340
REPAIRED_EVERY = 8  # of the damages; all of them are verified and read

Values = dict[int, list[torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Caches:
    """A cache, what it holds; and others whose intact files may be put into it."""

    path: Path
    files: dict[str, bytes]
    values: Values
    twin: dict[str, bytes]  # of the same spec and clip list, but of other videos
    other: dict[str, bytes]  # of the same videos, stored otherwise


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_reader, "_NFS_WAIT_S", 0.0)


@pytest.fixture(scope="module")
def caches(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Caches:
    folder = tmp_path_factory.mktemp("damage")
    clips = load_clips(motions)
    make_clips(folder / "videos", seed=1)
    extract_small(clips, folder / "cache")
    extract_small(load_clips(folder / "videos"), folder / "twin")
    spec = small_spec(clips, small_tower(motions), codec="raw", layers=(1, 2))
    extract_small(clips, folder / "other", spec=spec)
    return Caches(
        path=folder / "cache",
        files=tree(folder / "cache"),
        values=read_all(folder / "cache"),
        twin=tree(folder / "twin"),
        other=tree(folder / "other"),
    )


@pytest.fixture
def cache(caches: Caches) -> Iterator[Path]:
    """The cache, put back after the test as it was."""
    yield caches.path
    write_tree(caches.path, caches.files)


def write_tree(path: Path, files: dict[str, bytes]) -> None:
    now = tree(path)
    for name in differences(now, files):
        if name in files:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(files[name])
        else:
            (path / name).unlink()


def read_all(path: Path) -> Values:
    """Features of every valid sample: tokens, maps and class tokens, layer by layer."""
    opened = FeatureCache(path)
    return {int(sample): _read(opened, int(sample)) for sample in opened.is_valid.nonzero()[0]}


def _read(opened: FeatureCache, sample: int) -> list[torch.Tensor]:
    tokens, maps = opened.read([sample])
    return [*tokens, *(maps or []), *opened.read_class_tokens([sample])]


def wrong_samples(path: Path, expected: Values) -> tuple[list[int], int]:
    """Samples that a checked read serves with other values; and how many it refuses."""
    try:
        opened = FeatureCache(path)
    except CacheError:
        return [], len(expected)
    wrong, refused = [], 0
    for sample in range(len(opened)):
        try:
            found = _read(opened, sample)
        except CacheError:
            refused += 1
            continue
        right = expected.get(sample)
        if right is None or len(right) != len(found) or any(map(_differ, found, right)):
            wrong.append(sample)
    return wrong, refused


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.equal(one, other)


@pytest.mark.parametrize("part", range(4))
def test_every_damage_is_found_none_is_served_and_repair_undoes_it(
    caches: Caches, cache: Path, motions: Path, part: int
) -> None:
    rng = random.Random(part)
    done: Counter[str] = Counter()
    tried = 0
    while sum(done.values()) < DAMAGES // 4:
        damage = KINDS[tried % len(KINDS)]
        tried += 1
        name, content = damage(rng, caches)
        if content == caches.files[name]:
            continue  # the other file has the very same bytes
        if content is None:
            (cache / name).unlink()
        else:
            (cache / name).write_bytes(content)
        what = f"{damage.__name__} of {name}"
        assert verify_cache(cache, threads=1).problems, f"{what}: not found"
        wrong, _ = wrong_samples(cache, caches.values)
        assert wrong == [], f"{what}: served wrong features of samples {wrong}"
        done[kind_of(name)] += 1
        if tried % REPAIRED_EVERY == 0:
            result = repaired(cache, motions)
            assert differences(tree(cache), caches.files) == [], what
            assert len(result.blocks_redone) <= 1, what
            assert result.environment_differs == (), what
        else:
            (cache / name).write_bytes(caches.files[name])
    assert min(done[kind] for kind in ("data", "marks", "manifest", "metadata")) > 8


def repaired(cache: Path, motions: Path, *, redo_failed: bool = False) -> RepairResult:
    with one_thread():
        return repair(
            cache,
            tower=lambda description: small_tower(motions),
            root=motions,
            options=ExtractOptions(decode_workers=1, retry_failed=redo_failed),
            threads=1,
        )


def test_damage_of_several_kinds_at_once_is_repaired(caches: Caches, cache: Path, motions: Path) -> None:
    names = ["zarr.json", "tokens/zarr.json", "manifest.json", "done/000001.json", "maps/c.2.0.0.0.0.0"]
    for name in names:
        (cache / name).write_bytes(caches.files[name][:-3])
    result = repaired(cache, motions)
    assert result.blocks_redone == (1, 2)
    assert set(result.files_restored) == {"zarr.json", "tokens/zarr.json"}
    assert differences(tree(cache), caches.files) == []
    assert verify_cache(cache).problems == ()


def test_an_intact_cache_is_not_touched_and_its_tower_not_loaded(
    caches: Caches, cache: Path, motions: Path
) -> None:
    def load(description: CacheDescription) -> Tower:
        raise AssertionError("nothing is to be extracted")

    before = {name: (cache / name).stat().st_ino for name in caches.files if "/c." in name or "done" in name}
    result = repair(cache, tower=load, root=motions, options=ExtractOptions())
    assert (result.problems, result.blocks_redone, result.files_restored) == ((), (), ())
    assert result.cache_digest_before == result.cache_digest_after == FeatureCache(cache).fingerprint
    assert {name: (cache / name).stat().st_ino for name in before} == before


def test_clearing_a_mark_and_extracting_again_restores_the_bytes(
    caches: Caches, cache: Path, motions: Path
) -> None:
    (cache / "clips.jsonl").unlink()
    (cache / "token_affine/c.1.0.0.0").write_bytes(b"nonsense")
    assert restore_description(cache) == ["clips.jsonl"]
    spec = FeatureCache(cache).spec
    clear_mark(cache, spec, 1)
    assert not (cache / "manifest.json").exists()
    assert not (cache / "tokens/c.1.0.0.0.0").exists()
    extract_small(load_clips(motions), cache)
    assert write_manifest(cache, spec) == json.loads(caches.files["manifest.json"])["digest"]
    assert differences(tree(cache), caches.files) == []


def test_a_whole_block_of_another_cache_is_found_by_the_manifest(
    caches: Caches, cache: Path, motions: Path
) -> None:
    for name, content in caches.twin.items():
        if "/c.1." in name or name == "done/000001.json":
            (cache / name).write_bytes(content)
    assert [problem.block for problem in verify_cache(cache).problems] == [1]
    assert repaired(cache, motions).blocks_redone == (1,)
    assert differences(tree(cache), caches.files) == []


@pytest.mark.parametrize("name", ["zarr.json", "recovery.json"])
def test_a_description_of_another_cache_does_not_displace_the_right_one(
    caches: Caches, cache: Path, name: str
) -> None:
    (cache / name).write_bytes(caches.other[name])
    assert verify_cache(cache).problems
    assert restore_description(cache) == [name]
    assert differences(tree(cache), caches.files) == []


def test_both_copies_damaged_is_an_error_that_says_what_to_do(cache: Path, motions: Path) -> None:
    for name in ("zarr.json", "recovery.json"):
        (cache / name).write_bytes((cache / name).read_bytes()[:-40])
    assert verify_cache(cache).problems
    with pytest.raises(CacheError, match=r"both copies .* run the extract command"):
        repaired(cache, motions)


def test_lost_description_does_not_lose_the_blocks(caches: Caches, cache: Path, motions: Path) -> None:
    (cache / "zarr.json").unlink()
    clips = load_clips(motions)
    with pytest.raises(CacheDamaged, match="repair"):
        extract_small(clips, cache, spec=small_spec(clips, small_tower(motions), tokens="fp16"))
    assert repaired(cache, motions).files_restored == ("zarr.json",)
    assert differences(tree(cache), caches.files) == []


def test_damage_in_an_unfinished_cache_is_repaired_and_it_stays_unfinished(
    caches: Caches, cache: Path, motions: Path
) -> None:
    clear_mark(cache, FeatureCache(cache).spec, 2)
    unfinished = tree(cache)
    assert verify_cache(cache).problems == ()
    (cache / "tokens/c.0.0.0.0.0").write_bytes(b"")
    (cache / "done/000001.json").write_bytes(caches.files["done/000001.json"][:-1])
    result = repaired(cache, motions)
    assert result.blocks_redone == (0, 1)
    assert (result.is_complete, result.cache_digest_after) == (False, None)
    assert differences(tree(cache), unfinished) == []


def test_repair_says_where_the_environment_differs(caches: Caches, cache: Path, motions: Path) -> None:
    (cache / "done/000000.json").unlink()
    torch.set_num_threads(2)
    result = repair(
        cache, tower=lambda description: small_tower(motions), root=motions, options=ExtractOptions()
    )
    assert result.environment_differs == ("threads: 2, not 1",)
    assert result.cache_digest_before != result.cache_digest_after
    assert verify_cache(cache).problems == ()


def test_repair_with_another_tower_is_refused(cache: Path, motions: Path) -> None:
    (cache / "done/000000.json").unlink()
    tower = small_tower(motions)
    other = tower._replace(spec=replace(tower.spec, weights_sha256="0" * 64))
    with pytest.raises(UsageError, match="features differ"):
        repair(cache, tower=lambda description: other, root=motions, options=ExtractOptions())


def test_a_reader_open_during_repair_never_serves_other_values(
    caches: Caches, cache: Path, motions: Path, tmp_path: Path
) -> None:
    clips = load_clips(motions)
    opened = FeatureCache(cache)
    halfway = FeatureCache(cache)
    halfway.read([0])
    # The same block again, but of other videos: as after a repair on another machine, only more different.
    clear_mark(cache, opened.spec, 0)
    make_clips(tmp_path / "videos", seed=1)
    extract_small(clips, cache, folder=tmp_path / "videos")
    new = read_all(cache)
    assert any(map(_differ, new[0], caches.values[0]))
    for reading in (opened, halfway):
        for sample in (0, 1, 2):
            try:
                found = _read(reading, sample)
            except CacheDamaged:
                continue
            assert not any(map(_differ, found, caches.values[sample]))
    assert not any(map(_differ, _read(FeatureCache(cache), 0), new[0]))


def test_strays_are_named(cache: Path) -> None:
    shutil.copy(cache / "tokens/c.0.0.0.0.0", cache / "tokens/c.0.0.0.0.1")
    (cache / "done" / "000009.json").write_text("{}")
    found = verify_cache(cache)
    assert found.strays == ("done/000009.json", "tokens/c.0.0.0.0.1")
    assert found.problems == ()
