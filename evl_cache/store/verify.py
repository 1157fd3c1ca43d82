"""Proof of every byte: agreement of files, marks and manifest. Not authenticity: whoever can write the cache
can make a consistent other one; compare the cache digest with one you trust."""

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import file_digest
from evl_cache.store.disk.file_system import check_no_links, read_limited
from evl_cache.store.disk.publish import is_staging_name
from evl_cache.store.format.description import (
    MOST_DESCRIPTION_NBYTES,
    CacheDescription,
    read_clips,
    read_description,
)
from evl_cache.store.format.layout import DONE_NAME, MANIFEST_NAME, array_layouts, mark_path
from evl_cache.store.format.manifest import MOST_MANIFEST_NBYTES, Manifest, manifest_document, read_manifest
from evl_cache.store.format.marks import Mark, read_mark
from evl_cache.store.format.recomputed import read_projections
from evl_cache.store.format.recovery import check_recovery, has_intact_recovery
from evl_cache.store.objects.objects import DirectoryObjects
from evl_cache.store.shards.metadata import METADATA_NAME
from evl_cache.store.shards.shard_index import read_index
from evl_cache.untrusted.json_text import parse_json


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is not as promised. `block` is None for what belongs to no block."""

    block: int | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Attributes:
        problems: damage, by block.
        blocks_done, blocks: marked and intact; in all.
        strays: files inside the arrays that belong to no block.
        cache_digest: of the manifest; None where the cache is not complete or its manifest is damaged.
    """

    problems: tuple[Problem, ...]
    blocks_done: int
    blocks: int
    strays: tuple[str, ...]
    cache_digest: str | None


def verify_cache(
    root: Path, *, on_block: Callable[[], None] = lambda: None, threads: int = 2
) -> Verification:
    """Check every file of a cache.

    Args:
        on_block: called after each block. threads: blocks checked at a time.

    Raises: CacheError where there is no cache at all.
    """
    if not root.is_dir():
        raise CacheError(f"{root}: no such directory; give a cache that extract wrote")
    try:
        description = read_description(root)
    except CacheError as error:
        # Without a second copy it may be no cache, or one of another format: nothing that can be checked.
        if not isinstance(error, CacheDamaged) and not has_intact_recovery(root):
            raise
        problem = Problem(block=None, reason=str(error))
        return Verification(problems=(problem,), blocks_done=0, blocks=0, strays=(), cache_digest=None)
    spec = description.spec
    problems = _check_description(root, description)

    def check(block: int) -> tuple[Mark | None, list[str]]:
        result = _check_block(root, spec, block)
        on_block()
        return result

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(check, range(spec.num_blocks)))
    problems += [Problem(block=b, reason=r) for b, (_, reasons) in enumerate(results) for r in reasons]
    marks = {block: mark for block, (mark, reasons) in enumerate(results) if mark is not None and not reasons}
    cache_digest, more = _check_manifest(root, spec, marks, intact=not problems)
    return Verification(
        problems=tuple(problems + more),
        blocks_done=len(marks),
        blocks=spec.num_blocks,
        strays=tuple(_strays(root, spec)),
        cache_digest=cache_digest,
    )


def _check_description(root: Path, description: CacheDescription) -> list[Problem]:
    reasons = []
    try:
        read_clips(root, description)
    except CacheDamaged as error:
        reasons.append(str(error))
    if description.spec.recomputes_maps:
        try:
            read_projections(root, description.spec, description.projections_sha256)
        except CacheDamaged as error:
            reasons.append(str(error))
    recovery = check_recovery(root, description)
    if recovery is not None:
        reasons.append(recovery)
    written = read_limited(root / METADATA_NAME, MOST_DESCRIPTION_NBYTES)
    if written != canonical_json(parse_json(written)):
        reasons.append(f"{root / METADATA_NAME}: is not written as evl-cache writes it; repair the cache")
    for name, layout in array_layouts(description.spec).items():
        path = root / name / METADATA_NAME
        if _content(root, path) != canonical_json(layout.metadata(description.spec)):
            reasons.append(
                f"{path}: is not the metadata that the cache's description asks for; repair the cache"
            )
    return [Problem(block=None, reason=reason) for reason in reasons]


def _check_block(root: Path, spec: CacheSpec, block: int) -> tuple[Mark | None, list[str]]:
    try:
        mark = read_mark(root, block, spec)
    except CacheDamaged as error:
        return None, [str(error)]
    if mark is None:
        return None, []
    reasons = []
    written = _content(root, mark_path(root, block)) or b"{}"
    if written != canonical_json(parse_json(written)):  # a changed space or escape keeps the digest
        reasons.append(f"{mark_path(root, block)}: is not written as evl-cache writes it; repair the cache")
    for name, layout in array_layouts(spec).items():
        path, record = layout.shard(root, block), mark.files[name]
        try:
            check_no_links(root, path)
            if file_digest(path) != (record.size, record.sha256):
                reasons.append(f"{path}: its bytes are not those its mark promises; repair the cache")
            else:
                read_index(path, len(record.checksums))
        except CacheError as error:
            reasons.append(str(error))
    return mark, reasons


def _check_manifest(
    root: Path, spec: CacheSpec, marks: dict[int, Mark], *, intact: bool
) -> tuple[str | None, list[Problem]]:
    path = root / MANIFEST_NAME
    if not path.exists():
        if len(marks) < spec.num_blocks or not intact:
            return None, []
        return None, [
            Problem(block=None, reason=f"{path}: missing, though every block is done; repair the cache")
        ]
    try:
        manifest = read_manifest(root, spec)
    except CacheDamaged as error:
        return None, [Problem(block=None, reason=str(error))]
    if len(marks) < spec.num_blocks:
        absent = [
            Problem(
                block=block,
                reason=f"{mark_path(root, block)}: in the manifest, but not a valid mark; repair the cache",
            )
            for block in range(spec.num_blocks)
            if block not in marks
        ]
        return manifest.digest, absent
    if not intact:
        return manifest.digest, []
    document = manifest_document(root, spec, marks)
    if canonical_json(document) == _content(root, path):
        return manifest.digest, []
    return None, _disagreements(root, spec, manifest, document)


def _disagreements(
    root: Path, spec: CacheSpec, manifest: Manifest, document: Mapping[str, Any]
) -> list[Problem]:
    """Blocks that are whole in themselves but not those of the manifest, or, where most are, the manifest."""
    found = {name: (row["size"], row["sha256"]) for name, row in document["files"].items()}
    names = {mark_path(root, block).relative_to(root).as_posix(): block for block in range(spec.num_blocks)}
    problems = [
        Problem(
            block=block, reason=f"{root / name}: is not the mark that the manifest names; repair the cache"
        )
        for name, block in names.items()
        if manifest.files.get(name) != found[name]
    ]
    if 0 < len(problems) <= spec.num_blocks // 2:
        return problems
    reason = f"{root / MANIFEST_NAME}: does not agree with the files; repair the cache"
    return [Problem(block=None, reason=reason)]


def _content(root: Path, path: Path) -> bytes | None:
    """A file's bytes; None where there is none, or something else."""
    with contextlib.suppress(OSError, CacheError):
        return DirectoryObjects(root).get(path.relative_to(root).as_posix(), most_nbytes=MOST_MANIFEST_NBYTES)
    return None


def _strays(root: Path, spec: CacheSpec) -> list[str]:
    known = {mark_path(root, block) for block in range(spec.num_blocks)}
    out = [p for p in (root / DONE_NAME).iterdir() if p not in known] if (root / DONE_NAME).is_dir() else []
    for name, layout in array_layouts(spec).items():
        shards = {layout.shard(root, block) for block in range(spec.num_blocks)}
        out += [
            p for p in (root / name).rglob("*") if p.is_file() and p not in shards and p.name != METADATA_NAME
        ]
    return sorted(p.relative_to(root).as_posix() for p in out if not is_staging_name(p.name))
