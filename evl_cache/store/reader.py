"""Reading a cache: only marked blocks exist, and every chunk is checked against its mark.

B samples, T frames, P patches, N = 1+P tokens, C channels.
"""

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evl_cache.errors import CacheDamaged, UsageError
from evl_cache.quantize import frame_sum_
from evl_cache.spec import CacheSpec
from evl_cache.store.blocks_done import BlocksDone
from evl_cache.store.buffers import (
    CLASS_ARRAYS,
    MAP_ARRAYS,
    TOKEN_ARRAYS,
    BatchBuffers,
    MapRecipe,
    TokensRead,
)
from evl_cache.store.directory import read_clips, read_description
from evl_cache.store.file_system import check_no_links, is_local
from evl_cache.store.layout import MANIFEST_NAME, array_layouts, as_range
from evl_cache.store.local_copy import LocalCopy
from evl_cache.store.manifest import read_manifest
from evl_cache.store.objects import is_url
from evl_cache.store.read_ahead import ReadAhead
from evl_cache.store.recomputed import ProjectionOnDevices, read_projections
from evl_cache.store.rows import Row, StoredBatch
from evl_cache.store.shard import ShardReader
from evl_cache.store.shard_file import LocalFile
from evl_cache.store.shard_pool import ShardPool

_NFS_RETRIES = 2
_NFS_WAIT_S = 0.2
_READ_AHEAD = 8  # samples: without it a cold disk waits for each page fault
_READ_AHEAD_NBYTES = 1 << 16  # smaller chunks are not worth a system call


class FeatureCache:
    """A cache on disk, open for reading. Files are opened by the process that reads, at the first read.

    Attributes:
        place: where it lies, as it may be shown.
        spec: what it holds.
        clips: every clip of the list, failed ones included, in order.
        labels: int64 (samples,).
        is_valid: bool (samples,): extracted, and the clip did not fail.
        sample_clips: int64 (samples,): row of `clips`.
        is_local: whether it lies on a local disk. copy: what of a remote cache is kept on one; None for others.

    Args:
        path: directory that `extract` wrote, or URL of a complete cache: s3://…, http(s)://….
        trust: do not check chunks against their marks' checksums (the codecs' own checks remain).

    Raises: CacheError where there is no cache; CacheDamaged where its description is not intact.
    """

    def __init__(self, path: str | Path, *, trust: bool = False) -> None:
        self.copy = LocalCopy(str(path)) if is_url(path) else None
        self.path = Path(path) if self.copy is None else self.copy.path
        self.place = str(path) if self.copy is None else self.copy.url
        self._trust = trust and self.copy is None  # a copy is told from a hole by its chunks' checksums
        description = read_description(self.path)
        self.spec: CacheSpec = description.spec
        self.description = description
        self.clips = read_clips(self.path, description)
        if len(self.clips) != self.spec.num_clips:
            raise CacheDamaged(
                f"{path}: {len(self.clips)} clips listed, {self.spec.num_clips} described; repair the cache"
            )
        if any(clip.label >= len(self.spec.classes) for clip in self.clips):
            raise CacheDamaged(
                f"{path}: labels beyond its {len(self.spec.classes)} classes; repair the cache"
            )
        self.sample_clips = np.repeat(np.arange(self.spec.num_clips), self.spec.views.per_clip)
        self.labels = np.asarray([clip.label for clip in self.clips], dtype=np.int64)[self.sample_clips]
        self._done = BlocksDone(self.path, self.spec)
        self.is_valid = self._done.is_valid
        self._layouts = array_layouts(self.spec)
        self._num_samples = self.spec.num_samples
        self._num_layers, self._block_samples = len(self.spec.stored_layers), self.spec.block_samples
        maps_files = is_local(self.path)
        self._open_file = partial(LocalFile, map_file=maps_files)
        self.is_local = self.copy is None and maps_files
        self._read_ahead = ReadAhead(always=not maps_files)
        self._shards = ShardPool()
        self._projections: Mapping[int, ProjectionOnDevices] | None = None
        if self.copy is not None:
            self.copy.serve(self._done.files)

    def __len__(self) -> int:
        """Samples, failed and unfinished ones included."""
        return self.spec.num_samples

    @property
    def name(self) -> str:
        """The last part of its place."""
        return self.place.rstrip("/").rpartition("/")[2]

    @property
    def is_complete(self) -> bool:
        """Whether every block is done."""
        return self.num_blocks_done == self.spec.num_blocks

    @property
    def num_blocks_done(self) -> int:
        """Blocks with a valid mark."""
        return len(self._done.files)

    @property
    def fingerprint(self) -> str:
        """The cache digest: the manifest's once complete; before that, a digest of the marks there are."""
        if (self.path / MANIFEST_NAME).exists():
            return read_manifest(self.path, self.spec).digest
        return self._done.marks_digest

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What the cache was made with beside its spec: `root` of the videos, `model`, `pretrained`."""
        return self.description.recipe

    @property
    def failures(self) -> list[tuple[str, str]]:
        """(clip id, reason) of every failed clip of the blocks done."""
        return [(self.clips[row].id, reason) for row, reason in sorted(self._done.errors.items())]

    @property
    def damaged_marks(self) -> Mapping[int, str]:
        """Why a block whose mark is not intact does not exist, by block."""
        return self._done.damaged_marks

    @property
    def provenance(self) -> Mapping[tuple[str, tuple[int, int]], int]:
        """Clips by (decoder, source (height, width))."""
        return self._done.provenance

    def refresh(self) -> None:
        """See blocks that were finished since the cache was opened."""
        self._done.refresh()

    def check_marks(self, samples: np.ndarray[Any, Any]) -> None:
        """Whether the blocks of samples are whole or not there, as the manifest has them. Raises: CacheDamaged."""
        self._done.check(np.unique(samples // self._block_samples).tolist())

    def layer_positions(self, layers: Sequence[int] | None) -> list[int]:
        """Places of blocks in the arrays' layer axis. Raises: UsageError for one that is not stored."""
        wanted = self.spec.layers if layers is None else tuple(layers)
        missing = [layer for layer in wanted if layer not in self.spec.layers]
        if missing:
            raise UsageError(
                f"{self.place}: layers {missing} are not stored; it has {list(self.spec.layers)}"
            )
        return [self.spec.stored_layers.index(layer) for layer in wanted]

    def read(
        self, samples: Sequence[int], layers: Sequence[int] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Dequantised features, shallow to deep.

        Args:
            samples: rows, in any order. layers: blocks; all stored ones by default.

        Returns: float32 tokens, a (B, T, 1+P, C) for each layer; maps, a (B, 2, T-1, P, P) each, or None.
        Raises: CacheError for a sample that failed or is not extracted yet; CacheDamaged where bytes are not
            those that were written; UsageError for a sample or layer that does not exist.
        """
        return self.read_stored(samples, layers).dequantized()

    def read_stored(
        self,
        samples: Sequence[int],
        layers: Sequence[int] | None = None,
        *,
        with_maps: bool = True,
        tokens: TokensRead = "all",
    ) -> StoredBatch:
        """Features as they are stored. Arguments and errors as `read` and `buffers`; maps only where asked for."""
        buffers = self.buffers(slots=len(samples), layers=layers, with_maps=with_maps, tokens=tokens)
        self.read_into(buffers, enumerate(samples), layers)
        return buffers.batch(len(samples))

    def buffers(
        self,
        *,
        slots: int,
        layers: Sequence[int] | None = None,
        with_maps: bool = True,
        tokens: TokensRead = "all",
        pin_memory: bool = False,
    ) -> BatchBuffers:
        """Buffers for `read_into`.

        tokens: all of a frame, its class token alone (without maps), or `both`: all, and class tokens in float16.

        Raises: UsageError for a layer that is not stored.
        """
        assert tokens != "class" or not with_maps, "maps come with all tokens"
        names: tuple[str, ...] = () if tokens == "class" else TOKEN_ARRAYS
        names += (MAP_ARRAYS if with_maps else ()) + (() if tokens == "all" else CLASS_ARRAYS)
        layouts = [layout for name, layout in self._layouts.items() if name in names]
        recipe = self._map_recipe(layers) if with_maps and self.spec.recomputes_maps else None
        count = len(self.layer_positions(layers) if recipe is None else recipe.held)
        return BatchBuffers(layouts, num_layers=count, slots=slots, pin_memory=pin_memory, recipe=recipe)

    def _map_recipe(self, layers: Sequence[int] | None) -> MapRecipe:
        """How maps that are not stored are made. Raises: as `layer_positions`; CacheDamaged."""
        self.layer_positions(layers)
        if self._projections is None:
            found = read_projections(self.path, self.spec, self.description.projections_sha256)
            self._projections = {block: ProjectionOnDevices(value) for block, value in found.items()}
        wanted = self.spec.layers if layers is None else tuple(layers)
        held = tuple(sorted({layer - 1 for layer in wanted}.union(wanted)))
        return MapRecipe(wanted=wanted, held=held, projections=self._projections)

    def read_into(
        self, buffers: BatchBuffers, samples: Iterable[tuple[int, int]], layers: Sequence[int] | None = None
    ) -> None:
        """Read (slot, sample) pairs into the arrays that `buffers` has. Threads may share a cache, not a slot.

        Errors as `read`; the slots then hold anything.
        """
        self._read_positions(buffers, samples, self._positions(buffers, layers))

    def prefetch(
        self, buffers: BatchBuffers, samples: Iterable[int], layers: Sequence[int] | None = None
    ) -> None:
        """Begin to fetch what `read_into` will read; a cache on a disk has nothing to fetch."""
        if self.copy is not None:
            positions = as_range(self._positions(buffers, layers))
            self.copy.prefetch((self._chunks(s, positions) for s in samples), buffers.stacked)

    def _positions(self, buffers: BatchBuffers, layers: Sequence[int] | None) -> Sequence[int]:
        positions = self.layer_positions(layers)
        if buffers.recipe is None:
            return positions
        return [self.spec.stored_layers.index(layer) for layer in buffers.recipe.held]

    def _read_positions(
        self, buffers: BatchBuffers, samples: Iterable[tuple[int, int]], positions: Sequence[int]
    ) -> None:
        self._shards.renew_after_fork()
        wanted = list(samples)
        positions = as_range(positions)
        stacks = [(name, stack, self._layouts[name].differenced) for name, stack in buffers.stacked.items()]
        for name, stack, _ in stacks:
            self._layouts[name].check_stack(stack, len(positions))
        for start in range(0, len(wanted), _READ_AHEAD):
            group = wanted[start : start + _READ_AHEAD]
            if self._read_ahead.is_on():
                due = wanted[: 2 * _READ_AHEAD] if start == 0 else wanted[start + _READ_AHEAD :][:_READ_AHEAD]
                for _, later in due:
                    self._will_need(later, buffers.stacked, positions)
            with self._read_ahead.watching(len(group)):
                for slot, sample in group:
                    self._read_sample(stacks, slot, sample, positions)

    def _read_sample(
        self,
        stacks: Iterable[tuple[str, np.ndarray[Any, Any], bool]],
        slot: int,
        sample: int,
        positions: Sequence[int],
    ) -> None:
        block, chunks = self._chunks(self._checked_sample(sample), positions)
        if self.copy is not None:
            self.copy.ensure(block, [name for name, _, _ in stacks], chunks)
        for name, stack, differenced in stacks:
            outs = stack[:, slot]  # (L,*chunk)
            try:
                self._shards.get((name, block), self._open_shard).read_stacked(chunks, outs)
            except CacheDamaged:
                self._read_again(name, block, chunks, outs)
            if differenced:
                for out in outs:  # in the processor's cache still
                    frame_sum_(out)

    def close(self) -> None:
        """Let go of every open file; the next read opens what it needs again."""
        self._shards.close()

    def read_row(self, sample: int, positions: Sequence[int] | None = None) -> Row:
        """Every array's chunks of one sample, as `make_row` made them. Errors as `read`.

        Args:
            positions: along the layer axis; all by default.
        """
        positions = range(len(self.spec.stored_layers)) if positions is None else positions
        buffers = BatchBuffers(list(self._layouts.values()), num_layers=len(positions), slots=1)
        self._read_positions(buffers, [(0, sample)], positions)
        return {name: np.concatenate(arrays) for name, arrays in buffers.arrays.items()}

    def read_class_tokens(
        self, samples: Sequence[int], layers: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Class tokens alone, float32, a (B, T, C) for each layer. Errors as `read`."""
        count = len(self.layer_positions(layers))
        buffers = BatchBuffers([self._layouts["class_tokens"]], num_layers=count, slots=len(samples))
        self.read_into(buffers, enumerate(samples), layers)
        return [tensor.float() for tensor in buffers.tensors["class_tokens"]]

    def _checked_sample(self, sample: int) -> int:
        sample = int(sample)
        if not 0 <= sample < self._num_samples:
            raise UsageError(f"sample {sample} of {self.place}; expected 0 to {len(self) - 1}")
        if not self.is_valid[sample]:
            raise self._done.why_not_served(sample, self.clips, self.place)
        return sample

    def _chunks(self, sample: int, positions: Sequence[int]) -> tuple[int, Sequence[int]]:
        """Block of a sample, and its chunks in the block's shards."""
        block, row = divmod(sample, self._block_samples)
        first = row * self._num_layers
        if isinstance(positions, range):
            return block, range(first + positions.start, first + positions.stop, positions.step)
        return block, [first + position for position in positions]

    def _will_need(self, sample: int, names: Iterable[str], positions: Sequence[int]) -> None:
        block, chunks = self._chunks(self._checked_sample(sample), positions)
        for name in names:
            if self._layouts[name].chunk_nbytes >= _READ_AHEAD_NBYTES:
                with contextlib.suppress(CacheDamaged):  # the read itself looks again, and tells
                    self._shards.get((name, block), self._open_shard).will_need(chunks)

    def _read_again(self, name: str, block: int, chunks: Sequence[int], outs: np.ndarray[Any, Any]) -> None:
        """On NFS a mark can be seen before its data: look again, from a newly opened file."""
        for attempt in range(_NFS_RETRIES):
            if self.copy is not None:  # removed there to make room, or damaged on this disk
                self.copy.refetch(name, block, chunks)
            self._shards.forget((name, block))
            try:
                self._shards.get((name, block), self._open_shard).read_stacked(chunks, outs)
                return
            except CacheDamaged:
                if attempt + 1 == _NFS_RETRIES:
                    raise
                time.sleep(_NFS_WAIT_S)

    def _open_shard(self, key: tuple[str, int]) -> ShardReader:
        name, block = key
        layout, record = self._layouts[name], self._done.files[block][name]
        check_no_links(self.path, layout.shard(self.path, block).parent)
        return ShardReader(
            layout.shard(self.path, block),
            grid=(self.spec.block_samples, len(self.spec.stored_layers)),
            chunk_shape=layout.chunk_shape,
            dtype=layout.dtype,
            codec=layout.codec,
            checksums=record.checksums,
            trust=self._trust,
            open_file=self._open_file,
        )

    def __getstate__(self) -> dict[str, Any]:
        here_only = ("_shards", "_projections")  # files open in this process, tensors on its devices
        return {name: value for name, value in self.__dict__.items() if name not in here_only}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shards, self._projections = ShardPool(), None
        if self.copy is not None:
            self.copy.serve(self._done.files)
