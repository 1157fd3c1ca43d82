"""Caches with folders for each shard, as versions before flat chunk keys made them, beside those of today."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evl_cache.canonical_json import canonical_json, digest
from evl_cache.errors import CacheDamaged, UsageError
from evl_cache.extract import ExtractOptions
from evl_cache.extract.older_rule import spec_there
from evl_cache.extract.repair import repair
from evl_cache.spec import CacheSpec
from evl_cache.store import (
    FeatureCache,
    array_layouts,
    copy_part,
    copy_to_directory,
    mark_path,
    restore_description,
    verify_cache,
)
from evl_cache.store.format.layout import stored_blocks
from tests.support.store_helpers import (
    differences,
    extract_small,
    load_clips,
    one_thread,
    small_spec,
    small_tower,
    tree,
)

KINDS = ("folders", "flat")


def spec_of(motions: Path, keys: str, **changes: Any) -> CacheSpec:
    return small_spec(load_clips(motions), small_tower(motions), chunk_keys=keys, **changes)


@pytest.fixture(scope="module")
def made(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The same features in a cache of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for keys in KINDS:
        extract_small(load_clips(motions), folder / keys, spec=spec_of(motions, keys))
    return {keys: folder / keys for keys in KINDS}


@pytest.fixture
def older(made: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy of the cache of the older kind."""
    return Path(shutil.copytree(made["folders"], tmp_path / "older"))


def shards(cache: Path) -> dict[tuple[str, int], bytes]:
    """The bytes of every shard, by array and block."""
    spec = FeatureCache(cache).spec
    return {
        (name, block): layout.shard(cache, block).read_bytes()
        for name, layout in array_layouts(spec).items()
        for block in range(spec.num_blocks)
    }


def own(cache: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((cache / "zarr.json").read_bytes())["attributes"]["evl_cache"]
    return content


def test_features_clips_and_marks_are_the_same_to_the_byte_and_only_names_differ(
    made: Mapping[str, Path],
) -> None:
    assert shards(made["flat"]) == shards(made["folders"])
    old, new = (tree(made[keys]) for keys in KINDS)
    for name in ("clips.jsonl", *(name for name in old if name.startswith("done/"))):
        assert old[name] == new[name]
    assert len(old) == len(new)
    assert (own(made["folders"])["format_version"], own(made["flat"])["format_version"]) == (1, 2)
    assert (
        "chunk_keys" not in own(made["folders"])["spec"] and own(made["flat"])["spec"]["chunk_keys"] == "flat"
    )


def test_a_flat_cache_has_no_directory_a_block(made: Mapping[str, Path]) -> None:
    folders = [path.relative_to(made["flat"]).as_posix() for path in made["flat"].rglob("*") if path.is_dir()]
    assert sorted(folders) == sorted([*array_layouts(FeatureCache(made["flat"]).spec), "done", "locks"])
    assert (made["flat"] / "tokens" / "c.2.0.0.0.0").is_file()
    assert (made["folders"] / "tokens" / "c" / "2" / "0" / "0" / "0" / "0").is_file()


@pytest.mark.parametrize("keys", KINDS)
def test_both_kinds_are_whole_and_tell_their_blocks(made: Mapping[str, Path], keys: str) -> None:
    spec = FeatureCache(made[keys]).spec
    assert spec.chunk_keys == keys
    found = verify_cache(made[keys])
    assert (found.problems, found.strays, found.blocks_done) == ((), (), spec.num_blocks)
    assert stored_blocks(made[keys], spec) == set(range(spec.num_blocks))


@pytest.mark.parametrize("keys", KINDS)
def test_a_shard_under_the_other_kinds_name_belongs_to_no_block(
    made: Mapping[str, Path], tmp_path: Path, keys: str
) -> None:
    cache, other = Path(shutil.copytree(made[keys], tmp_path / "cache")), KINDS[keys == "folders"]
    layouts = array_layouts(replace(FeatureCache(cache).spec, chunk_keys=other))
    path = layouts["maps"].shard(cache, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    assert verify_cache(cache).strays == (path.relative_to(cache).as_posix(),)


@pytest.mark.parametrize("keys", KINDS)
def test_a_format_version_with_the_other_versions_keys_was_edited(
    made: Mapping[str, Path], tmp_path: Path, keys: str
) -> None:
    cache = Path(shutil.copytree(made[keys], tmp_path / "cache"))
    content = own(cache)
    content["format_version"] = 3 - content["format_version"]
    content["digest"] = digest({name: value for name, value in content.items() if name != "digest"})
    group = json.loads((cache / "zarr.json").read_bytes())
    group["attributes"]["evl_cache"] = content
    (cache / "zarr.json").write_bytes(canonical_json(group))
    with pytest.raises(
        CacheDamaged, match=r"cache format [12] with chunk keys .* was edited; repair the cache"
    ):
        FeatureCache(cache)
    assert restore_description(cache) == ["zarr.json"]
    assert differences(tree(cache), tree(made[keys])) == []


def test_extract_goes_on_with_an_older_cache_as_it_is(
    motions: Path, made: Mapping[str, Path], older: Path
) -> None:
    spec = spec_there(spec_of(motions, "flat"), older)
    assert spec == spec_of(motions, "folders")
    mark_path(older, 1).unlink()
    (older / "manifest.json").unlink()
    shutil.rmtree(older / "tokens" / "c" / "1")
    extract_small(load_clips(motions), older, spec=spec)
    assert differences(tree(older), tree(made["folders"])) == []


def test_without_that_it_is_another_cache_and_stays(motions: Path, older: Path) -> None:
    before = tree(older)
    with pytest.raises(UsageError, match='chunk_keys: "flat", not "folders"'):
        extract_small(load_clips(motions), older)
    assert differences(tree(older), before) == []


def test_an_older_cache_is_repaired_to_the_byte(motions: Path, made: Mapping[str, Path], older: Path) -> None:
    shard = older / "maps" / "c" / "2" / "0" / "0" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-9])
    (older / "tokens" / "zarr.json").unlink()
    with one_thread():
        options = ExtractOptions(decode_workers=1, batch=4)
        result = repair(older, tower=lambda _: small_tower(motions), root=motions, options=options)
    assert result.blocks_redone == (2,) and result.files_restored == ("tokens/zarr.json",)
    assert differences(tree(older), tree(made["folders"])) == []


@pytest.mark.parametrize("keys", KINDS)
def test_rows_are_reused_between_the_kinds(
    motions: Path, made: Mapping[str, Path], tmp_path: Path, keys: str
) -> None:
    other = KINDS[keys == "folders"]
    extract_small(load_clips(motions), tmp_path / "new", spec=spec_of(motions, keys), reuse=made[other])
    assert shards(tmp_path / "new") == shards(made[keys])


@pytest.mark.parametrize("keys", KINDS)
def test_a_copy_is_of_its_sources_kind(made: Mapping[str, Path], tmp_path: Path, keys: str) -> None:
    copy_to_directory(str(made[keys]), tmp_path / "copy")
    assert differences(tree(tmp_path / "copy"), tree(made[keys])) == []
    other = KINDS[keys == "folders"]
    with pytest.raises(UsageError, match="chunk_keys"):
        copy_to_directory(str(made[other]), tmp_path / "copy")


def test_a_part_of_an_older_cache_is_a_cache_of_today(
    motions: Path, made: Mapping[str, Path], tmp_path: Path
) -> None:
    extract_small(load_clips(motions), tmp_path / "direct", spec=spec_of(motions, "flat", layers=(3,)))
    for keys in KINDS:
        copy_part(made[keys], tmp_path / keys, layers=(3,), codec=None)
    assert shards(tmp_path / "folders") == shards(tmp_path / "flat") == shards(tmp_path / "direct")
    assert FeatureCache(tmp_path / "folders").fingerprint == FeatureCache(tmp_path / "flat").fingerprint


def test_a_part_that_an_older_version_began_is_finished_as_it_is(
    motions: Path, made: Mapping[str, Path], tmp_path: Path
) -> None:
    part = spec_of(motions, "folders", layers=(3,))
    extract_small(load_clips(motions), tmp_path / "whole", spec=part)
    begun = Path(shutil.copytree(tmp_path / "whole", tmp_path / "begun"))
    mark_path(begun, 1).unlink()
    (begun / "manifest.json").unlink()
    copy_part(made["folders"], begun, layers=(3,), codec=None)
    assert shards(begun) == shards(tmp_path / "whole") and FeatureCache(begun).spec == part


@pytest.mark.parametrize("keys", KINDS)
def test_both_kinds_give_the_same_values(made: Mapping[str, Path], keys: str) -> None:
    cache, other = FeatureCache(made[keys]), FeatureCache(made["flat"])
    for sample in np.flatnonzero(cache.is_valid):
        for one, two in zip(
            cache.read_row(int(sample)).values(), other.read_row(int(sample)).values(), strict=True
        ):
            np.testing.assert_array_equal(one, two)
