"""Proof of every byte: agreement of files, marks and manifest.

It is no proof of authenticity: whoever can write the cache can make a consistent other one. Compare the cache
digest with one you trust.
"""

import contextlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import file_digest
from evl_cache.store.disk.file_system import entries_below, read_limited
from evl_cache.store.disk.publish import is_staging_name
from evl_cache.store.format.description import (
    CacheDescription,
    description_files,
    read_clips,
    read_description,
)
from evl_cache.store.format.layout import (
    DONE_NAME,
    MANIFEST_NAME,
    array_layouts,
    blocks_in_redo,
    mark_name,
    mark_path,
    marked_blocks,
    redo_path,
)
from evl_cache.store.format.limits import MOST_DESCRIPTION_NBYTES, manifest_limit
from evl_cache.store.format.manifest import Manifest, find_manifest
from evl_cache.store.format.recomputed import read_projections
from evl_cache.store.format.recovery import check_recovery, has_intact_recovery
from evl_cache.store.objects.objects import DirectoryObjects
from evl_cache.store.objects.workers import Workers
from evl_cache.store.proving.files import OnProgress, Sample, ShardProof
from evl_cache.store.proving.index_proof import IndexProof
from evl_cache.store.proving.manifest_text import proved_manifest
from evl_cache.store.proving.promises import Promises, not_canonical, read_mark_whole
from evl_cache.store.reading.remote_shards import RemoteShards
from evl_cache.store.shards.metadata import METADATA_NAME
from evl_cache.untrusted.json_text import parse_json

_MARK_NAME = re.compile(rf"{DONE_NAME}/([0-9]{{6,12}})\.json")
_FIRST_NUMBER = re.compile("[/.]([0-9]{1,12})(?![0-9])")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is not as promised.

    Attributes:
        block: the block it belongs to, or None.
        reason: what is wrong, and what to do.
    """

    block: int | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Attributes:
        problems: damage, by block.
        blocks_done: blocks that are marked and intact.
        blocks: blocks in all.
        strays: files inside the arrays that belong to no block.
        cache_digest: the manifest's; None where the cache is not complete or its manifest is damaged.
        sampled_blocks: blocks whose shards were read; None where all were. With it, what is said of shards is said of
            these blocks only, and the digest is of files of which not all were read.
    """

    problems: tuple[Problem, ...]
    blocks_done: int
    blocks: int
    strays: tuple[str, ...]
    cache_digest: str | None
    sampled_blocks: int | None = None


def verify_cache(
    cache_path: Path,
    *,
    threads: int = 2,
    sample: Sample | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
    remote: RemoteShards | None = None,
) -> Verification:
    """Check every file of a cache; with a sample all but the shards of blocks that are not in it.

    Args:
        threads: files read at a time.
        sample: of which blocks the shards are read; of all by default.
        on_progress: see `OnProgress`.
        remote: reads the shards of a cache of which all else was brought from a server.

    Raises: CacheError where there is no cache at all, or a server fails.
    """
    if not cache_path.is_dir():
        raise CacheError(f"{cache_path}: no such directory; give a cache that extract wrote")
    try:
        description = read_description(cache_path)
    except CacheError as error:
        # Without a second copy it may be no cache, or one of another format: nothing that can be checked.
        if not isinstance(error, CacheDamaged) and not has_intact_recovery(cache_path):
            raise
        problem = Problem(block=None, reason=str(error))
        return Verification(problems=(problem,), blocks_done=0, blocks=0, strays=(), cache_digest=None)
    spec = description.spec
    problems = _check_description(cache_path, description)
    with Workers(threads, *(() if remote is None else (remote.objects,))) as workers:
        index = IndexProof(cache_path, spec)
        promises, reasons = _check_marks(cache_path, spec, index, workers, on_progress)
        read = promises.blocks if sample is None else sample.draw(promises.blocks)
        proof = ShardProof(cache_path, spec, promises, workers, remote)
        for block, reason in proof.read(read, on_progress):
            reasons.setdefault(block, []).append(reason)
    for block in sorted(reasons):
        problems += _problems(reasons[block], block)
    cache_digest, more = _check_manifest(
        cache_path, spec, promises, blamed=reasons.keys(), intact=not problems
    )
    agrees = cache_digest is not None and not more and len(promises) == spec.num_blocks
    more += _index_problems(cache_path, description, index, cache_digest if agrees else None)
    return Verification(
        problems=tuple(problems + more),
        blocks_done=len(set(promises.blocks) - reasons.keys()),
        blocks=spec.num_blocks,
        strays=tuple(_strays(cache_path, spec)),
        cache_digest=cache_digest,
        sampled_blocks=None if sample is None else len(read),
    )


def _check_marks(
    cache_path: Path, spec: CacheSpec, index: IndexProof, workers: Workers, on_progress: OnProgress
) -> tuple[Promises, dict[int, list[str]]]:
    """Return what all intact marks promise, and what is wrong with marks, by block."""
    promises, reasons, in_redo = Promises(spec), dict[int, list[str]](), blocks_in_redo(cache_path)
    # Only those that are there: a stranger's description may claim a hundred million.
    begun = sorted(block for block in marked_blocks(cache_path) | in_redo if block < spec.num_blocks)
    found = workers.each(lambda block: read_mark_whole(cache_path, block, spec), begun)
    for done, (block, read) in enumerate(zip(begun, found, strict=True), start=1):
        wrong = list(read.wrong)
        if read.mark is not None:
            promises.admit(block, read.promise)
            index.add(read.mark)
        if block in in_redo and (read.mark is not None or not wrong):
            redo = redo_path(cache_path, block)
            wrong.append(f"{redo}: a redo was begun and not ended; repair the cache")
        if wrong:
            reasons[block] = wrong
        on_progress("marks", done, len(begun))
    return promises, reasons


def _index_problems(
    cache_path: Path, description: CacheDescription, index: IndexProof, cache_digest: str | None
) -> list[Problem]:
    labels = None
    with contextlib.suppress(CacheDamaged):  # told already
        labels = read_clips(cache_path, description).labels
    found = index.problem(cache_digest, labels)
    return [] if found is None else _problems([found])


def _problems(reasons: Iterable[str], block: int | None = None) -> list[Problem]:
    return [Problem(block=block, reason=reason) for reason in reasons]


def _check_description(cache_path: Path, description: CacheDescription) -> list[Problem]:
    spec, reasons = description.spec, []
    try:
        read_clips(cache_path, description)
    except CacheDamaged as error:
        reasons.append(str(error))
    if spec.recomputes_maps:
        try:
            read_projections(cache_path, spec, description.projections_sha256)
        except CacheDamaged as error:
            reasons.append(str(error))
    recovery = check_recovery(cache_path, description)
    if recovery is not None:
        reasons.append(recovery)
    path = cache_path / METADATA_NAME
    written = read_limited(path, MOST_DESCRIPTION_NBYTES)
    if written != canonical_json(parse_json(written)):
        reasons.append(not_canonical(path))
    for name, layout in array_layouts(spec).items():
        path = cache_path / name / METADATA_NAME
        if not _holds(cache_path, path, canonical_json(layout.metadata(spec))):
            reasons.append(
                f"{path}: is not the metadata that the cache's description asks for; repair the cache"
            )
    return _problems(reasons)


def _check_manifest(
    cache_path: Path,
    spec: CacheSpec,
    promises: Promises,
    *,
    blamed: Collection[int],
    intact: bool,
) -> tuple[str | None, list[Problem]]:
    path, is_complete = cache_path / MANIFEST_NAME, len(promises) == spec.num_blocks
    if is_complete and intact and (proved := _proved_manifest(cache_path, spec, promises)) is not None:
        return proved, []
    try:
        manifest = find_manifest(cache_path, spec)
    except CacheDamaged as error:
        return None, _problems([str(error)])
    if manifest is None:
        missing = f"{path}: missing, though every block is done; repair the cache"
        return None, _problems([missing] if is_complete and intact else [])
    done = set(promises.blocks) - set(blamed)
    if len(done) < spec.num_blocks:
        reason = "in the manifest, but not a valid mark; repair the cache"
        named = (int(match[1]) for name in manifest.files if (match := _MARK_NAME.fullmatch(name)))
        undone = sorted(block for block in named if block < spec.num_blocks and block not in done)
        absent = [block for block in undone if block not in blamed]
        unnamed = f"{path}: does not name every block; repair the cache"
        is_whole = len(undone) + len(done) >= spec.num_blocks
        return manifest.digest, _blamed(cache_path, absent, reason) + _problems([] if is_whole else [unnamed])
    if not intact:
        return manifest.digest, []
    return None, _disagreements(cache_path, spec, manifest, promises)


def _proved_manifest(cache_path: Path, spec: CacheSpec, promises: Promises) -> str | None:
    """Return the digest of the manifest where it is, to the last byte, the one of these files."""
    description = {name: file_digest(cache_path / name) for name in description_files(spec)}
    with contextlib.suppress(OSError, CacheError):
        written = DirectoryObjects(cache_path).get(MANIFEST_NAME, most_nbytes=manifest_limit(spec))
        return proved_manifest(written, spec, promises.rows(description))
    return None


def _disagreements(
    cache_path: Path, spec: CacheSpec, manifest: Manifest, promises: Promises
) -> list[Problem]:
    """Name the blocks that are whole but not those of the manifest, or the manifest where these are most."""
    named = manifest.files
    others = [block for block in promises.blocks if named.get(mark_name(block)) != promises.mark(block)]
    if 0 < len(others) <= spec.num_blocks // 2:
        return _blamed(cache_path, others, "is not the mark that the manifest names; repair the cache")
    return _problems([f"{cache_path / MANIFEST_NAME}: does not agree with the files; repair the cache"])


def _blamed(cache_path: Path, blocks: Iterable[int], reason: str) -> list[Problem]:
    return [Problem(block=block, reason=f"{mark_path(cache_path, block)}: {reason}") for block in blocks]


def _holds(cache_path: Path, path: Path, content: bytes) -> bool:
    return DirectoryObjects(cache_path).holds(path.relative_to(cache_path).as_posix(), content)


def _strays(cache_path: Path, spec: CacheSpec) -> list[str]:
    names_of = {DONE_NAME: mark_name}
    names_of |= {name: layout.shard_name for name, layout in array_layouts(spec).items()}
    out: list[str] = []
    for directory, name_of in names_of.items():
        for name, _ in entries_below(cache_path, directory):
            number = _FIRST_NUMBER.search(name)  # of the block, where it is one's
            is_known = (
                number is not None and int(number[1]) < spec.num_blocks and name == name_of(int(number[1]))
            )
            if not is_known and name != f"{directory}/{METADATA_NAME}":
                out.append(name)
    out = [name for name in out if not is_staging_name(name.rpartition("/")[2])]
    redone = {redo_path(Path(), block).as_posix() for block in blocks_in_redo(cache_path)}
    return sorted(set(out) - redone)
