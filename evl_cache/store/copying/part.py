"""A part of a cache, or all of it under another codec, as a cache of its own: the same features, other files.

The new cache is what extraction with those layers and that codec would have written, byte for byte: values are
decoded and encoded again, and the records of clips and of the machine go along.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from evl_cache.errors import UsageError
from evl_cache.notation import layers_of
from evl_cache.spec import CHUNK_KEYS, CacheSpec
from evl_cache.store.copying.source import OnBlock, TransferResult
from evl_cache.store.disk.locks import LockWatcher
from evl_cache.store.format.description import with_keys_there
from evl_cache.store.format.layout import LOCKS_NAME, array_layouts, is_in_redo
from evl_cache.store.format.marks import Mark
from evl_cache.store.format.recomputed import read_projections
from evl_cache.store.reading.reader import FeatureCache
from evl_cache.store.writing.block_writer import BlockWriter
from evl_cache.store.writing.create import create_cache
from evl_cache.store.writing.finish import finish_cache
from evl_cache.store.writing.publication import valid_mark


def part_spec(spec: CacheSpec, *, layers: Sequence[int] | None, codec: str | None) -> CacheSpec:
    """Return the spec of a part, with the chunk keys of today.

    Raises: UsageError for layers that the cache has not, or an unknown codec.
    """
    wanted = spec.layers if layers is None else layers_of(layers)
    missing = [layer for layer in wanted if layer not in spec.layers]
    if missing:
        raise UsageError(
            f"--layers {list(wanted)}: {missing} are not stored; the cache has {list(spec.layers)}"
        )
    return replace(spec, layers=wanted, codec=codec or spec.codec, chunk_keys=CHUNK_KEYS[0])


def copy_part(
    place: str | Path,
    target: Path,
    *,
    layers: Sequence[int] | None,
    codec: str | None,
    threads: int = 2,
    on_block: OnBlock = lambda moved: None,
) -> TransferResult:
    """Take layers of a cache, or store it under another codec. Run it again after a kill.

    Args:
        layers: layers of the tower; all stored ones by default.
        codec: profile of the codec; the cache's own by default.
        threads: threads that encode.
        on_block: called after each block, with whether it was made.

    Raises: as `copy_to_directory`.
    """
    cache = FeatureCache(place)
    try:
        return _copy_part(cache, target, layers=layers, codec=codec, threads=threads, on_block=on_block)
    except BaseException:
        cache.end_waits()  # of what is fetched ahead
        raise


def _copy_part(
    cache: FeatureCache,
    target: Path,
    *,
    layers: Sequence[int] | None,
    codec: str | None,
    threads: int,
    on_block: OnBlock,
) -> TransferResult:
    if cache.members:
        raise UsageError(
            f"{cache.place} has grown ({', '.join(member.told for member in cache.members[1:])}), and a part is taken of a cache "
            "that was made at once; copy it whole, or extract what you want into a cache of its own with --reuse"
        )
    spec = with_keys_there(part_spec(cache.spec, layers=layers, codec=codec), target)
    projections = None
    if spec.recomputes_maps:
        found = read_projections(cache.path, cache.spec, cache.description.projections_sha256)
        projections = {layer: found[layer] for layer in spec.layers}
    create_cache(
        target,
        spec,
        cache.clips,
        origin=cache.origin,
        created_with=cache.description.created_with,
        projections=projections,
    )
    locks, moved, done = LockWatcher(target / LOCKS_NAME), [], 0
    with ThreadPoolExecutor(threads, thread_name_prefix="encode") as encoders:
        for block in range(spec.num_blocks):
            mark = cache.mark(block)
            if mark is None:
                continue
            with locks.wait_for(f"{block:06d}") as lock:
                there = valid_mark(target, spec, block)
                if is_in_redo(target, block):
                    there = None
                if there is None or (there.clips, there.environment) != (mark.clips, mark.environment):
                    writer = BlockWriter(target, spec, block, lock=lock, encoders=encoders)
                    moved.append(_copy_rows(cache, writer, mark))
                    there = None
            done += 1
            on_block(there is None)
    return TransferResult(
        place=str(target),
        blocks=done,
        blocks_moved=len(moved),
        nbytes_moved=sum(moved),
        cache_digest=finish_cache(target, spec) if done == spec.num_blocks else None,
    )


def _copy_rows(cache: FeatureCache, writer: BlockWriter, mark: Mark) -> int:
    """Write the rows of a block. Returns: bytes written."""
    source = cache.spec
    count = len(source.stored_layers)
    positions = [source.stored_layers.index(layer) for layer in writer.spec.stored_layers]
    views = source.views.per_clip
    failed = [clip.error is not None for clip in mark.clips for _ in range(views)]
    first = mark.block * source.block_samples
    try:
        if cache.copy is not None:
            wanted = [
                [row * count + at for at in positions] for row, is_out in enumerate(failed) if not is_out
            ]
            cache.copy.shards.prefetch(((mark.block, chunks) for chunks in wanted), array_layouts(source))
        for row, is_out in enumerate(failed):
            writer.append(None if is_out else cache.read_row(first + row, positions))
        written = writer.commit(mark.clips, mark.environment)
    finally:
        writer.close()
    return sum(record.size for record in written.files.values())
