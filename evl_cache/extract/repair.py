"""Repair: what `verify` finds is restored from its second copy, or extracted again; nothing else is touched.

A broken block is redone by the code that made it, which keeps of the block what passes its checksums.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evl_cache.canonical_json import flatten
from evl_cache.clips import ClipList
from evl_cache.errors import NO_SUCH_FILE, CacheDamaged, CacheError, UsageError
from evl_cache.extract.decoding import decoding_for
from evl_cache.extract.defaults import batch_for
from evl_cache.extract.environment import run_environment
from evl_cache.extract.job import ExtractionJob, ExtractOptions, OnClip, check_tower
from evl_cache.extract.outages import OnOutage
from evl_cache.extract.redo import KEPT_ENVIRONMENTS, BlockRedo
from evl_cache.extract.stage import BlocksResult, extract_blocks, tower_projections
from evl_cache.processes import usable_cpus
from evl_cache.spec import FRAME_RULE
from evl_cache.store import (
    PROJECTIONS_NAME,
    CacheDescription,
    FeatureCache,
    KnownBlocks,
    OnProgress,
    Problem,
    blocks_in_redo,
    finish_cache,
    manifest_at,
    mark_file_digest,
    mark_path,
    projections_content,
    read_description,
    read_projections,
    restore_description,
    valid_mark,
    withdraw_index,
    write_projections,
)
from evl_cache.store import verify_alone as verify_cache
from evl_cache.towers import Tower, build_tower

LoadTower = Callable[[CacheDescription], Tower]


@dataclass(frozen=True, kw_only=True)
class RepairResult:
    """What was found and done.

    Attributes:
        problems: what `verify` found.
        files_restored: files of the description that were written again.
        blocks_redone: blocks that are whole again; what passed its checksums was kept, the rest extracted.
        not_redone: why features that are damaged stay as they are: what they were made of is not there now.
        is_complete: whether every block is done now; an unfinished cache stays one.
        cache_digest_before: None where it had no intact manifest.
        cache_digest_after: None where the cache is unfinished.
        environment_differs: `field: now, not then` for what decides bytes and differs from the marks (device,
            threads, versions, …). Where there is any, the cache digest changes, and features agree within rounding
            only.
    """

    problems: tuple[Problem, ...]
    files_restored: tuple[str, ...]
    blocks_redone: tuple[int, ...]
    not_redone: tuple[str, ...]
    is_complete: bool
    cache_digest_before: str | None
    cache_digest_after: str | None
    environment_differs: tuple[str, ...]


def repair(
    cache_path: Path,
    *,
    tower: LoadTower,
    root: Path | None = None,
    options: ExtractOptions,
    on_clip: OnClip = lambda failed: None,
    on_outage: OnOutage = lambda message: None,
    threads: int | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> RepairResult:
    """Make a damaged cache whole. Killed at any instant, it may be run again.

    Args:
        tower: loads what the cache was made with; called only where a block has to be extracted, or the file
            from which maps are recomputed has to be written again.
        root: folder of the videos; by default where they were when the cache was made.
        options: as for `extract`; its `batch` gives way to the one in the marks, which decides bytes.
        on_clip: called with whether it failed, after each clip.
        on_outage: as for `extract`.
        threads: how many verify; as many as there are processors by default.
        on_progress: as for `verify_cache`.

    Raises: CacheError where both copies of the description are damaged or the disk refuses; UsageError for
        another tower than the cache's; Outage where the videos cannot be read now.
    """
    threads = threads or usable_cpus()
    found = verify_cache(cache_path, threads=threads, on_progress=on_progress)
    problems = list(found.problems)
    restored = []
    if any(problem.block is None for problem in problems):
        restored = restore_description(cache_path)
        withdraw_index(cache_path)  # it is made again of the marks
    if found.blocks == 0:  # the description was too damaged to look further
        found = verify_cache(cache_path, threads=threads, on_progress=on_progress)
        problems += found.problems
    description = read_description(cache_path)
    restored += _restore_projections(cache_path, description, tower)
    broken = sorted({problem.block for problem in problems if problem.block is not None})
    did = BlocksResult(clips=0, batch=0, stayed={}, kept_instead={})
    differs: tuple[str, ...] = ()
    if broken:
        job = _job_of(cache_path, tower, root)
        did, differs = _redo(job, broken, options=options, on_clip=on_clip, on_outage=on_outage)
    # What stays as it is keeps its signs for the next repair: the note of a redo, the manifest that names another mark.
    stays = bool(did.kept_instead) or not blocks_in_redo(cache_path).isdisjoint(did.stayed)
    intact = sum(1 for _ in KnownBlocks(cache_path, description.spec).all())
    is_complete = intact == description.spec.num_blocks and not stays
    return RepairResult(
        problems=tuple(problems),
        files_restored=tuple(restored),
        blocks_redone=tuple(block for block in broken if block not in did.stayed),
        not_redone=did.not_redone,
        is_complete=is_complete,
        cache_digest_before=found.cache_digest,
        cache_digest_after=(
            finish_cache(cache_path, description.spec, lock_expiry_s=options.lock_expiry_s)
            if is_complete
            else None
        ),
        environment_differs=differs,
    )


def _job_of(cache_path: Path, tower: LoadTower, root: Path | None) -> ExtractionJob:
    """The job that a cache was made by, its tower loaded. Raises: UsageError for another tower."""
    cache = FeatureCache(cache_path, grown=False)
    videos = root or cache.origin.get("root")
    if not videos:
        raise UsageError("the cache does not tell where its videos lie; give --root")
    if _is_gone(Path(str(videos))):
        moved = "" if root else ", where the videos of this cache were"
        raise UsageError(
            f"{videos}: no such folder{moved}; give --root where they are now, or bring the disk back; no block was redone"
        )
    return ExtractionJob(
        clips=ClipList(clips=cache.clips, classes=cache.spec.classes, source=str(cache_path)),
        root=Path(str(videos)),
        cache_path=cache_path,
        spec=cache.spec,
        tower=tower(cache.description),
        origin=cache.origin,
    )


def _is_gone(folder: Path) -> bool:
    try:
        folder.stat()
    except OSError as error:
        return error.errno in NO_SUCH_FILE  # whatever else there is may pass, and is waited for
    return False


def _redo(
    job: ExtractionJob,
    broken: Sequence[int],
    *,
    options: ExtractOptions,
    on_clip: OnClip,
    on_outage: OnOutage,
) -> tuple[BlocksResult, tuple[str, ...]]:
    """Redo blocks, in batches as then. Return what was done, and how the environment differs from the one in the marks."""
    then = _environment_then(job, broken)
    options = replace(options, batch=int(then.get("batch") or batch_for(options, job.spec)))
    decoding = decoding_for(job.spec.pixels, options.decoding, device=options.device)
    options = replace(options, decoding=decoding)
    did = extract_blocks(
        job, broken, redo=_why_redone(job, broken), options=options, on_clip=on_clip, on_outage=on_outage
    )
    if not did.clips:
        return did, ()
    now = run_environment(options, job.spec, batch=did.batch, visual=job.tower.visual)
    now |= {"frame_rule": FRAME_RULE}
    return did, _differences(now, {**then, "frame_rule": job.spec.frame_rule})


def _why_redone(job: ExtractionJob, broken: Sequence[int]) -> dict[int, BlockRedo]:
    """For each broken block its redo: all of it is made again where the manifest names another mark than lies there."""
    manifest, spec = manifest_at(job.cache_path, job.spec), job.spec
    found = {}
    for block in broken:
        mark = valid_mark(job.cache_path, spec, block)
        named = manifest.files.get(mark_path(Path(), block).as_posix()) if manifest else None
        is_other = mark is not None and named not in (None, mark.file_digest, mark_file_digest(mark, spec))
        rows = frozenset(spec.clips_of_block(block)) if is_other else frozenset[int]()
        found[block] = BlockRedo(again=rows, rewrite=True)
    return found


def _restore_projections(cache_path: Path, description: CacheDescription, tower: LoadTower) -> list[str]:
    """Write the file from which maps are recomputed again, where it is damaged. Return its name, or nothing."""
    if not description.spec.recomputes_maps:
        return []
    try:
        read_projections(cache_path, description.spec, description.projections_sha256)
        return []
    except CacheDamaged:
        loaded = tower(description)
    check_tower(loaded, description.spec, cache_path)
    projections = tower_projections(loaded, description.spec)
    assert projections is not None
    content = projections_content(projections)
    if hashlib.sha256(content).hexdigest() != description.projections_sha256:
        raise CacheError(
            f"{cache_path / PROJECTIONS_NAME}: is damaged, and what this version writes is not byte for byte what was "
            "there; repair with the versions that made the cache (evl-cache info names them)"
        )
    write_projections(cache_path, content)
    return [PROJECTIONS_NAME]


def _environment_then(job: ExtractionJob, broken: Sequence[int]) -> Mapping[str, Any]:
    """What the broken blocks were made with, as their own marks say, else the marks of other blocks."""
    for block in [*broken, *(set(range(job.spec.num_blocks)) - set(broken))]:
        if (mark := valid_mark(job.cache_path, job.spec, block)) is not None:
            return {name: value for name, value in mark.environment.items() if name != KEPT_ENVIRONMENTS}
    return {}


def _differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> tuple[str, ...]:
    mine, theirs = flatten(now), flatten(then)
    both = sorted(mine.keys() & theirs.keys())  # marks of other versions tell less, or more
    return tuple(f"{name}: {mine[name]}, not {theirs[name]}" for name in both if mine[name] != theirs[name])


def load_tower(
    description: CacheDescription, *, model: str | None = None, pretrained: str | None = None
) -> Tower:
    """The tower named, or the one that the cache's origin names."""
    origin = description.origin
    names = {"model": model or origin.get("model"), "pretrained": pretrained or origin.get("pretrained")}
    for name, value in names.items():
        if not value:
            raise UsageError(f"the cache does not tell its {name}; give --{name}")
    return build_tower(str(names["model"]), str(names["pretrained"]))
