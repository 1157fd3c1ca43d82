"""A job that was paused while it finished a cache, and wakes after another job has changed and finished it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from evl_cache.store import LOCKS_NAME, FeatureCache, finish_cache, verify_cache
from evl_cache.store.format.index_head import INDEX_NAME
from evl_cache.store.format.layout import MANIFEST_NAME, mark_name
from evl_cache.store.writing import completion
from tests.support.feature_caches import write_cache


def changed_by_another_job(cache: Path, other: Path) -> None:
    """Another job takes the lock over, redoes block 1 and finishes the cache."""
    for lock in (cache / LOCKS_NAME).iterdir():
        lock.unlink()
    (cache / MANIFEST_NAME).unlink(missing_ok=True)
    for name in [mark_name(1), *(path.relative_to(other) for path in other.glob("*/c.1.*"))]:
        shutil.copy(other / name, cache / name)
    completion.write_manifest(cache, FeatureCache(cache).spec)


@pytest.mark.parametrize("keeps_manifest", [False, True])
@pytest.mark.parametrize("paused_at", [1, 2])  # at its index, at its manifest
def test_what_a_late_job_wrote_of_older_marks_is_not_taken_for_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_manifest: bool, paused_at: int
) -> None:
    path = write_cache(tmp_path / "cache", failed=(5,)).path
    other = write_cache(tmp_path / "other", seed=5).path
    spec = FeatureCache(path).spec
    (path / MANIFEST_NAME).unlink()
    publish, published = completion.StagedFile.publish_replacing, 0

    def late(*arguments: Any, **named: Any) -> None:
        nonlocal published
        published += 1
        if published == paused_at:
            changed_by_another_job(path, other)
        publish(*arguments, **named)

    monkeypatch.setattr(completion.StagedFile, "publish_replacing", late)
    digest = finish_cache(path, spec, keeps_manifest=keeps_manifest, lock_expiry_s=0.5)
    assert published > paused_at and not verify_cache(path).problems
    found = FeatureCache(path)
    assert found.fingerprint == digest == found.index_digest and found.failures == []


def test_a_job_that_was_paused_long_at_its_index_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_cache(tmp_path / "cache", failed=(5,)).path
    other = write_cache(tmp_path / "other", seed=5).path
    spec = FeatureCache(path).spec
    (path / MANIFEST_NAME).unlink()
    seal, sealed = completion.StagedFile.seal, 0

    def late(staged: completion.StagedFile) -> None:
        nonlocal sealed
        sealed += 1
        if sealed == 1:
            changed_by_another_job(path, other)
            after.extend((path / name).read_bytes() for name in names)
        seal(staged)

    names, after = (MANIFEST_NAME, INDEX_NAME), list[bytes]()
    monkeypatch.setattr(completion.StagedFile, "seal", late)
    digest = finish_cache(path, spec, keeps_manifest=True, lock_expiry_s=0.5)
    assert [(path / name).read_bytes() for name in names] == after
    assert FeatureCache(path).index_digest == digest
