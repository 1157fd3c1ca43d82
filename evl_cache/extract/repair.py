"""Repair: what `verify` finds is restored from its second copy, or extracted again; nothing else is touched.

Composes the extract stage, because a block is repaired by the very code that made it.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evl_cache.canonical_json import flatten
from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.extract.environment import run_environment
from evl_cache.extract.stage import ExtractOptions, OnClip, extract_blocks, tower_projections
from evl_cache.spec import CacheSpec
from evl_cache.store import (
    PROJECTIONS_NAME,
    CacheDescription,
    FeatureCache,
    Mark,
    Problem,
    finish_cache,
    projections_content,
    read_description,
    read_projections,
    restore_description,
    valid_mark,
    verify_cache,
    write_projections,
)
from evl_cache.towers import Tower, build_tower

LoadTower = Callable[[CacheDescription], Tower]
FindRoot = Callable[[CacheDescription], Path]


@dataclass(frozen=True, kw_only=True)
class RepairResult:
    """What was found and done.

    Attributes:
        problems: what `verify` found.
        files_restored: files of the description that were written again.
        blocks_redone: blocks that were extracted again.
        is_complete: whether every block is done now; an unfinished cache stays one.
        cache_digest_before: None where it had no intact manifest. cache_digest_after: None where unfinished.
        environment_differs: `field: now, not then` for what decides bytes and differs from the marks (device,
            threads, versions, …): where there is any and a block was redone, the cache digest changes, and
            features agree within rounding only.
    """

    problems: tuple[Problem, ...]
    files_restored: tuple[str, ...]
    blocks_redone: tuple[int, ...]
    is_complete: bool
    cache_digest_before: str | None
    cache_digest_after: str | None
    environment_differs: tuple[str, ...]


def repair(
    cache: Path,
    *,
    tower: LoadTower,
    root: Path | FindRoot,
    options: ExtractOptions,
    on_clip: OnClip = lambda failed: None,
    threads: int = 2,
) -> RepairResult:
    """Make a damaged cache whole. Killed at any instant, it may be run again.

    Args:
        tower: loads what the cache was made with; called only where a block has to be extracted, or the file
            of what recomputes maps written again.
        root: what relative clip paths are relative to, or what tells it from the cache's description.
        options: as for `extract`; its `batch` gives way to the one in the marks, which decides bytes.
        on_clip: called with whether it failed, after each clip. threads: for verifying.

    Raises: CacheError where both copies of the description are damaged or the disk refuses; UsageError for
        another tower than the cache's.
    """
    found = verify_cache(cache, threads=threads)
    problems = list(found.problems)
    restored = restore_description(cache) if any(problem.block is None for problem in problems) else []
    if found.blocks == 0:  # the description was too damaged to look further
        found = verify_cache(cache, threads=threads)
        problems += found.problems
    description = read_description(cache)
    spec = description.spec
    restored += _restore_projections(cache, description, tower)
    broken = sorted({problem.block for problem in problems if problem.block is not None})
    differs: tuple[str, ...] = ()
    if broken:
        then = _environment_then(cache, spec, broken)
        root = root if isinstance(root, Path) else root(description)
        options = replace(options, batch=int(then.get("batch", options.batch)), retry_failed=False)
        if spec.pixels != options.decoding.pixels:  # only torchcodec has its own
            decoding = replace(options.decoding, decoder="torchcodec", device=options.device)
            options = replace(options, decoding=decoding)
        differs = _redo(cache, broken, then, tower=tower, root=root, options=options, on_clip=on_clip)
    is_complete = FeatureCache(cache).is_complete
    return RepairResult(
        problems=tuple(problems),
        files_restored=tuple(restored),
        blocks_redone=tuple(broken),
        is_complete=is_complete,
        cache_digest_before=found.cache_digest,
        cache_digest_after=(
            finish_cache(cache, spec, lock_expiry_s=options.lock_expiry_s) if is_complete else None
        ),
        environment_differs=differs,
    )


def _redo(
    cache: Path,
    broken: list[int],
    then: Mapping[str, Any],
    *,
    tower: LoadTower,
    root: Path,
    options: ExtractOptions,
    on_clip: OnClip,
) -> tuple[str, ...]:
    """Extract blocks again. Returns: how the environment differs from the one of the marks."""
    opened = FeatureCache(cache)
    loaded = _checked_tower(cache, opened.description, tower)
    extract_blocks(
        opened.clips,
        broken,
        redo=broken,
        root=root,
        cache=cache,
        spec=opened.spec,
        tower=loaded,
        options=options,
        on_clip=on_clip,
    )
    now = run_environment(
        batch=options.batch, device=torch.device(options.device), compute_dtype=opened.spec.compute_dtype
    )
    return _differences(now, then)


def _checked_tower(cache: Path, description: CacheDescription, tower: LoadTower) -> Tower:
    """The cache's own tower. Raises: UsageError for another one."""
    spec, loaded = description.spec, tower(description)
    if replace(spec, tower=loaded.spec).feature_id != spec.feature_id:
        raise UsageError(
            f"{cache} was made with {spec.tower.model} ({spec.tower.pretrained}), the tower given is "
            f"{loaded.spec.model} ({loaded.spec.pretrained}): their features differ; give the model and weights "
            "the cache was made with"
        )
    return loaded


def _restore_projections(cache: Path, description: CacheDescription, tower: LoadTower) -> list[str]:
    """Write the file of what recomputes maps again where it is damaged. Returns: its name, or nothing."""
    if not description.spec.recomputes_maps:
        return []
    try:
        read_projections(cache, description.spec, description.projections_sha256)
        return []
    except CacheDamaged:
        loaded = _checked_tower(cache, description, tower)
    projections = tower_projections(loaded, description.spec)
    assert projections is not None
    content = projections_content(projections)
    if hashlib.sha256(content).hexdigest() != description.projections_sha256:
        raise CacheError(
            f"{cache / PROJECTIONS_NAME}: is damaged, and what this version writes is not byte for byte what was "
            "there; repair with the versions that made the cache (evl-cache info names them)"
        )
    write_projections(cache, content)
    return [PROJECTIONS_NAME]


def _environment_then(cache: Path, spec: CacheSpec, broken: list[int]) -> Mapping[str, Any]:
    """What the broken blocks were made with: as their own marks say, else the marks of other blocks."""
    marks: list[Mark] = []
    for block in [*broken, *(set(range(spec.num_blocks)) - set(broken))]:
        mark = valid_mark(cache, spec, block)
        if mark is not None:
            marks.append(mark)
            break
    return marks[0].environment if marks else {}


def _differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> tuple[str, ...]:
    mine, theirs = flatten(now), flatten(then)
    return tuple(
        f"{name}: {mine.get(name)}, not {theirs.get(name)}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    )


def tower_loader(model: str | None, pretrained: str | None) -> LoadTower:
    """Loads the tower named, or the one that the cache's origin names."""

    def load(description: CacheDescription) -> Tower:
        origin = description.origin
        names = {"model": model or origin.get("model"), "pretrained": pretrained or origin.get("pretrained")}
        for name, value in names.items():
            if not value:
                raise UsageError(f"the cache does not tell its {name}; give --{name}")
        visual, spec = build_tower(str(names["model"]), str(names["pretrained"]))
        return Tower(visual=visual, spec=spec)

    return load


def videos_root(description: CacheDescription, given: Path | None) -> Path:
    """Where the videos lie: as given, or where they were when the cache was made."""
    root = given or description.origin.get("root")
    if not root:
        raise UsageError("the cache does not tell where its videos lie; give --root")
    return Path(str(root))
