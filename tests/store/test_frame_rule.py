"""Caches of before frames had a rule stay what they were; marks say of which rule a clip's frames are."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from evl_cache.caches.info import describe, frames_of
from evl_cache.errors import CacheDamaged
from evl_cache.spec import FRAME_RULE
from evl_cache.store import (
    LOCKS_NAME,
    ClipRecord,
    FeatureCache,
    LockWatcher,
    copy_part,
    copy_to_directory,
    finish_cache,
    mark_file_digest,
    mark_path,
    replace_records,
    valid_mark,
    verify_cache,
)
from evl_cache.store.format.marks import mark_content, parse_mark
from tests.support.feature_caches import write_cache
from tests.support.older_caches import GOLDEN
from tests.support.store_helpers import tree

# As the version that wrote the cache told them.
FEATURE_ID = "05ccb1883aa04fbe7e31e1ef60d4c7b06c8d1f3c2e3ec419636eb078806aaea2"
DIGEST = "04f22dd1c4eec12168b4db9d8fef1475a6b3828c6ea3ba658af6ed4e80e05bde"
VALUES = "c42dbd1331df7ac2986bcd63353d6671471cb26e6a67ae031973420dbe99998e"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def values_of(cache: FeatureCache) -> str:
    tokens, maps = cache.read([0, 1, 2])
    found = hashlib.sha256()
    for tensor in (*tokens, *(maps or ())):
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def test_a_cache_of_the_first_rule_keeps_its_identity_digests_and_values(golden: Path) -> None:
    cache = FeatureCache(golden)
    assert (cache.spec.feature_id, cache.spec.name) == (FEATURE_ID, "motions-train-bedc3916")
    assert (cache.spec.frame_rule, cache.fingerprint) == (1, DIGEST)
    assert values_of(cache) == VALUES
    assert replace(cache.spec, frame_rule=FRAME_RULE).feature_id != FEATURE_ID
    found = verify_cache(golden)
    assert (found.problems, found.cache_digest, found.blocks_done) == ((), DIGEST, 2)


def test_its_marks_are_written_again_byte_for_byte(golden: Path) -> None:
    spec = FeatureCache(golden).spec
    for block in range(spec.num_blocks):
        mark = valid_mark(golden, spec, block)
        assert mark is not None and mark_file_digest(mark, spec) == mark.file_digest
        assert mark_content(mark, spec) == mark_path(golden, block).read_bytes()


def test_its_clips_are_told_by_their_kind_of_file_to_be_doubtful_or_not_known(golden: Path) -> None:
    cache = FeatureCache(golden)
    assert dict(cache.by_older_rule) == dict.fromkeys(range(3), "decord 0.6.0")  # the fourth clip failed
    found = frames_of(cache)
    assert (found.rule, found.by_older_rule, found.doubtful, found.untold) == (1, 3, 1, 2)
    assert describe(golden)["frames"] == {"rule": 1, "by_older_rule": 3, "doubtful": 1, "untold": 2}
    assert "1 doubtful by their kind of file, 2 can be told only by the videos" in found.told()


def test_copies_and_parts_of_it_are_of_its_rule(golden: Path, tmp_path: Path) -> None:
    copy_to_directory(golden, tmp_path / "copy")
    assert (
        tree(tmp_path / "copy").items()
        >= {n: c for n, c in tree(golden).items() if not n.startswith("locks/")}.items()
    )
    copy_part(golden, tmp_path / "part", layers=(3,), codec="raw")
    part = FeatureCache(tmp_path / "part")
    assert (part.spec.frame_rule, part.spec.feature_id, len(part.by_older_rule)) == (1, FEATURE_ID, 3)


def test_records_of_a_later_rule_are_beside_what_older_readers_take_for_a_record(golden: Path) -> None:
    cache, features = FeatureCache(golden), tree(golden)
    mark = valid_mark(golden, cache.spec, 0)
    assert mark is not None
    before = json.loads(mark_path(golden, 0).read_bytes())
    clips = (replace(mark.clips[0], frame_rule=FRAME_RULE), *mark.clips[1:])
    with LockWatcher(golden / LOCKS_NAME).wait_for("000000") as lock:
        assert replace_records(golden, cache.spec, mark, clips, lock=lock)
    digest = finish_cache(golden, cache.spec)

    after = json.loads(mark_path(golden, 0).read_bytes())
    assert after.pop("frame_rules") == [FRAME_RULE, None, None]
    assert {n: v for n, v in after.items() if n != "digest"} == {
        n: v for n, v in before.items() if n != "digest"
    }
    found = FeatureCache(golden)
    assert sorted(found.by_older_rule) == [1, 2] and found.fingerprint == digest != DIGEST
    assert found.spec.feature_id == FEATURE_ID and values_of(found) == VALUES
    assert verify_cache(golden).problems == ()
    changed = {name for name, content in tree(golden).items() if features.get(name) != content}
    assert {name for name in changed if not name.startswith("locks/")} == {
        "done/000000.json",
        "index.bin",
        "manifest.json",
    }
    copy_part(golden, golden.parent / "part", layers=(3,), codec=None)
    assert sorted(FeatureCache(golden.parent / "part").by_older_rule) == [1, 2]


def test_records_are_not_replaced_where_the_files_are_damaged(golden: Path) -> None:
    spec = FeatureCache(golden).spec
    mark = valid_mark(golden, spec, 0)
    assert mark is not None
    shard = golden / "tokens" / "c" / "0" / "0" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    before = tree(golden)
    clips = [replace(clip, frame_rule=FRAME_RULE) for clip in mark.clips]
    with LockWatcher(golden / LOCKS_NAME).wait_for("000000") as lock:
        assert not replace_records(golden, spec, mark, clips, lock=lock)
    assert {n: c for n, c in tree(golden).items() if not n.startswith("locks/")} == before


@pytest.mark.parametrize(
    "rules", [[2], [2, 2, 2, 2], ["2", None, None], [True, None, None], [0, None, None], {"0": 2}, 7]
)
def test_rules_that_are_none_make_a_mark_damaged(rules: object, golden: Path) -> None:
    from evl_cache.canonical_json import signed_json

    spec = FeatureCache(golden).spec
    content = json.loads(mark_path(golden, 0).read_bytes()) | {"frame_rules": rules}
    del content["digest"]
    with pytest.raises(CacheDamaged, match="incomplete"):
        parse_mark(signed_json(content)[0], "mark", 0, spec)


def test_a_clip_is_of_an_older_rule_only_where_it_has_features() -> None:
    from tests.test_spec import SPEC

    old = replace(SPEC, frame_rule=1)
    assert ClipRecord(id="a").is_by_older_rule(old)
    assert not ClipRecord(id="a", error="broken").is_by_older_rule(old)
    assert not ClipRecord(id="a", frame_rule=FRAME_RULE).is_by_older_rule(old)
    assert not ClipRecord(id="a").is_by_older_rule(SPEC)
    assert not ClipRecord(id="a").is_by_older_rule(replace(SPEC, frame_rule=FRAME_RULE + 1))


def test_a_new_cache_is_all_of_the_rule_of_today(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache")
    assert cache.spec.frame_rule == cache.frame_rule == FRAME_RULE
    assert frames_of(cache).told() == f"all clips by rule {FRAME_RULE}"
    assert "frame_rules" not in json.loads(mark_path(tmp_path / "cache", 0).read_bytes())
