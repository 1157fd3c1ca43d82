"""Repair of a cache and of what was added to it: each of them alone, then `grown.json`, which names them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evl_cache.errors import CacheDamaged
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.repair import RepairResult, repair
from evl_cache.store import FeatureCache, Problem, cache_parts, directory_of, renew_grown, restore_grown


def repair_all(cache_path: Path, *, options: ExtractOptions, **how: Any) -> RepairResult:
    """Make a damaged cache whole, and what was added to it. Killed at any instant, it may be run again.

    Arguments and errors as `repair`; UsageError for a URL; CacheDamaged where both copies of `grown.json`
    are damaged, or an addition is gone.
    """
    cache_path = directory_of(cache_path)
    before = _fingerprint(cache_path)
    base = repair(cache_path, options=options, **how)
    damage, restored = restore_grown(cache_path)
    parts = cache_parts(cache_path)
    if parts.grown is None:
        return base
    done = [base, *(repair(part.path, options=options, **how) for part in parts.parts[1:])]
    is_complete = all(one.is_complete for one in done)
    if is_complete:
        renew_grown(cache_path, lock_expiry_s=options.lock_expiry_s)
    firsts = _first_blocks([part.spec.num_blocks for part in parts.parts])
    return replace(
        base,
        problems=(
            *(Problem(block=None, reason=reason) for reason in damage),
            *(problem for one in done for problem in one.problems),
        ),
        files_restored=(
            *restored,
            *(
                (part.path / name).relative_to(cache_path).as_posix()
                for part, one in zip(parts.parts, done, strict=True)
                for name in one.files_restored
            ),
        ),
        blocks_redone=tuple(
            first + block for first, one in zip(firsts, done, strict=True) for block in one.blocks_redone
        ),
        not_redone=tuple(reason for one in done for reason in one.not_redone),
        is_complete=is_complete,
        cache_digest_before=before,
        cache_digest_after=_fingerprint(cache_path) if is_complete else None,
        environment_differs=tuple(sorted({told for one in done for told in one.environment_differs})),
    )


def _fingerprint(cache_path: Path) -> str | None:
    """Return the cache digest; None where it is not complete, or cannot be told."""
    try:
        cache = FeatureCache(cache_path)
        return cache.fingerprint if cache.has_manifest else None
    except CacheDamaged:
        return None


def _first_blocks(counts: Sequence[int]) -> list[int]:
    """Return the number of each part's first block among the blocks of all."""
    return [sum(counts[:part]) for part in range(len(counts))]
