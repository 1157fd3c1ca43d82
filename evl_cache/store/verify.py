"""Proof of every byte: agreement of files, marks and manifest.

It is no proof of authenticity: whoever can write the cache can make a consistent other one. Compare the cache
digest with one you trust.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import file_digest
from evl_cache.store.disk.file_system import check_no_links, files_below, read_limited
from evl_cache.store.disk.publish import is_staging_name
from evl_cache.store.format.description import (
    CacheDescription,
    read_clips,
    read_description,
)
from evl_cache.store.format.layout import (
    DONE_NAME,
    MANIFEST_NAME,
    array_layouts,
    blocks_in_redo,
    is_in_redo,
    mark_name,
    mark_path,
    marked_blocks,
    redo_path,
)
from evl_cache.store.format.limits import MOST_DESCRIPTION_NBYTES
from evl_cache.store.format.manifest import Manifest, block_files, find_manifest, manifest_content
from evl_cache.store.format.marks import parse_mark, read_mark_bytes
from evl_cache.store.format.recomputed import read_projections
from evl_cache.store.format.recovery import check_recovery, has_intact_recovery
from evl_cache.store.objects.objects import DirectoryObjects
from evl_cache.store.shards.metadata import METADATA_NAME
from evl_cache.store.shards.shard_index import read_index
from evl_cache.untrusted.json_text import parse_json

_MARK_NAME = re.compile(rf"{DONE_NAME}/([0-9]{{6,12}})\.json")
_FIRST_NUMBER = re.compile("[/.]([0-9]{1,12})(?![0-9])")
BlockFiles = Mapping[str, tuple[int, str]]  # as `block_files` returns them


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
    """

    problems: tuple[Problem, ...]
    blocks_done: int
    blocks: int
    strays: tuple[str, ...]
    cache_digest: str | None


def verify_cache(
    cache_path: Path, *, on_block: Callable[[], None] = lambda: None, threads: int = 2
) -> Verification:
    """Check every file of a cache.

    Args:
        on_block: called after each block that has a mark.
        threads: blocks checked at a time.

    Raises: CacheError where there is no cache at all.
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

    def check(block: int) -> tuple[BlockFiles, list[str]]:
        result = _check_block(cache_path, spec, block)
        on_block()
        return result

    # Only those that are there: a stranger's description may claim a hundred million.
    begun = marked_blocks(cache_path) | blocks_in_redo(cache_path)
    marked = sorted(block for block in begun if block < spec.num_blocks)
    with ThreadPoolExecutor(threads) as pool:
        results = dict(zip(marked, pool.map(check, marked), strict=True))
    for block, (_, reasons) in results.items():
        problems += _problems(reasons, block)
    done = {block: files for block, (files, reasons) in results.items() if files and not reasons}
    blamed = {block for block, (_, reasons) in results.items() if reasons}
    cache_digest, more = _check_manifest(cache_path, spec, done, blamed=blamed, intact=not problems)
    return Verification(
        problems=tuple(problems + more),
        blocks_done=len(done),
        blocks=spec.num_blocks,
        strays=tuple(_strays(cache_path, spec)),
        cache_digest=cache_digest,
    )


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
    reasons += _not_canonical(path, read_limited(path, MOST_DESCRIPTION_NBYTES))
    for name, layout in array_layouts(spec).items():
        path = cache_path / name / METADATA_NAME
        if not _holds(cache_path, path, canonical_json(layout.metadata(spec))):
            reasons.append(
                f"{path}: is not the metadata that the cache's description asks for; repair the cache"
            )
    return _problems(reasons)


def _check_block(cache_path: Path, spec: CacheSpec, block: int) -> tuple[BlockFiles, list[str]]:
    """Return what the manifest should say of a block, nothing where it is not done, and what is wrong with it."""
    marked, begun = mark_path(cache_path, block), []
    if is_in_redo(cache_path, block):
        begun = [f"{redo_path(cache_path, block)}: a redo was begun and not ended; repair the cache"]
    try:
        written = read_mark_bytes(cache_path, block, spec)
        if written is None:
            return {}, begun
        mark = parse_mark(written, marked, block, spec)
    except CacheDamaged as error:
        return {}, [str(error)]
    reasons = _not_canonical(marked, written) + begun
    for name, layout in array_layouts(spec).items():
        path, record = layout.shard(cache_path, block), mark.files[name]
        try:
            check_no_links(cache_path, path)
            if file_digest(path) != record.digest:
                reasons.append(f"{path}: its bytes are not those its mark promises; repair the cache")
            else:
                read_index(path, len(record.chunk_checksums))
        except CacheError as error:
            reasons.append(str(error))
    return block_files(mark, spec), reasons


def _check_manifest(
    cache_path: Path,
    spec: CacheSpec,
    done: Mapping[int, BlockFiles],
    *,
    blamed: Collection[int],
    intact: bool,
) -> tuple[str | None, list[Problem]]:
    path, is_complete = cache_path / MANIFEST_NAME, len(done) == spec.num_blocks
    try:
        manifest = find_manifest(cache_path, spec)
    except CacheDamaged as error:
        return None, _problems([str(error)])
    if manifest is None:
        missing = f"{path}: missing, though every block is done; repair the cache"
        return None, _problems([missing] if is_complete and intact else [])
    if not is_complete:
        reason = "in the manifest, but not a valid mark; repair the cache"
        named = (int(match[1]) for name in manifest.files if (match := _MARK_NAME.fullmatch(name)))
        undone = sorted(block for block in named if block < spec.num_blocks and block not in done)
        absent = [block for block in undone if block not in blamed]
        unnamed = f"{path}: does not name every block; repair the cache"
        is_whole = len(undone) + len(done) >= spec.num_blocks
        return manifest.digest, _blamed(cache_path, absent, reason) + _problems([] if is_whole else [unnamed])
    if not intact:
        return manifest.digest, []
    files = {name: digest for block in done.values() for name, digest in block.items()}
    content, found = manifest_content(cache_path, spec, files)
    if _holds(cache_path, path, content):
        return manifest.digest, []
    return None, _disagreements(cache_path, spec, manifest, found)


def _disagreements(cache_path: Path, spec: CacheSpec, manifest: Manifest, found: Manifest) -> list[Problem]:
    """Name the blocks that are whole but not those of the manifest, or the manifest where these are most."""
    names = {block: mark_name(block) for block in range(spec.num_blocks)}
    others = [block for block, name in names.items() if manifest.files.get(name) != found.files[name]]
    if 0 < len(others) <= spec.num_blocks // 2:
        return _blamed(cache_path, others, "is not the mark that the manifest names; repair the cache")
    return _problems([f"{cache_path / MANIFEST_NAME}: does not agree with the files; repair the cache"])


def _blamed(cache_path: Path, blocks: Iterable[int], reason: str) -> list[Problem]:
    return [Problem(block=block, reason=f"{mark_path(cache_path, block)}: {reason}") for block in blocks]


def _not_canonical(path: Path, written: bytes) -> list[str]:
    """Return what is wrong with a document's form, if anything: a changed space or escape keeps its digest."""
    if written == canonical_json(parse_json(written)):
        return []
    return [f"{path}: is not written as evl-cache writes it; repair the cache"]


def _holds(cache_path: Path, path: Path, content: bytes) -> bool:
    return DirectoryObjects(cache_path).holds(path.relative_to(cache_path).as_posix(), content)


def _strays(cache_path: Path, spec: CacheSpec) -> list[str]:
    names_of = {DONE_NAME: mark_name}
    names_of |= {name: layout.shard_name for name, layout in array_layouts(spec).items()}
    out: list[str] = []
    for directory, name_of in names_of.items():
        for name, _ in files_below(cache_path, directory):
            number = _FIRST_NUMBER.search(name)  # of the block, where it is one's
            is_known = (
                number is not None and int(number[1]) < spec.num_blocks and name == name_of(int(number[1]))
            )
            if not is_known and name != f"{directory}/{METADATA_NAME}":
                out.append(name)
    out = [name for name in out if not is_staging_name(name.rpartition("/")[2])]
    redone = {redo_path(Path(), block).as_posix() for block in blocks_in_redo(cache_path)}
    return sorted(set(out) - redone)
