"""Reading a cache: only marked blocks exist, and every chunk is checked against its mark.

B samples, T frames, P patches, N = 1+P tokens, C channels.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evl_cache.errors import UsageError
from evl_cache.notation import layers_of
from evl_cache.spec import FRAME_RULE, CacheSpec
from evl_cache.store.format.description import check_labels, read_clips, read_description
from evl_cache.store.format.layout import array_layouts, as_range
from evl_cache.store.format.manifest import find_manifest, manifest_at, manifest_digest
from evl_cache.store.format.marks import Mark
from evl_cache.store.format.recomputed import ProjectionOnDevices, read_projections
from evl_cache.store.format.rows import Row, StoredBatch
from evl_cache.store.objects.address import is_url
from evl_cache.store.reading.blocks_done import BlocksDone
from evl_cache.store.reading.buffers import (
    CLASS_ARRAYS,
    MAP_ARRAYS,
    TOKEN_ARRAYS,
    BatchBuffers,
    ProjectedMaps,
    Reads,
)
from evl_cache.store.reading.grown import GrownCache, open_grown
from evl_cache.store.reading.indices import Indices, row_of, rows_of
from evl_cache.store.reading.local_copy import LocalCopy
from evl_cache.store.reading.member import Member, base_member
from evl_cache.store.reading.sample_reader import SampleReader


class FeatureCache:
    """A cache on disk, open for reading. Files are opened by the process that reads, at the first read.

    Attributes:
        place: where it lies, as it may be shown.
        spec: what it holds.
        clips: every clip of the list, failed ones included, in order; rows are parsed when they are asked for.
        is_valid: bool (samples,): extracted, and the clip did not fail.
        is_local: whether it lies on a local disk.
        copy: what of a remote cache is kept on a local disk; None for others.

    Args:
        path: directory that `extract` wrote, or URL of a complete cache: s3://…, http(s)://….
        trust: do not check chunks against their marks' checksums (the codecs' own checks remain).
        grown: read what was added to it, too.

    Raises: CacheError where there is no cache; CacheDamaged where its description is not intact.
    """

    def __init__(self, path: str | Path, *, trust: bool = False, grown: bool = True) -> None:
        self.copy = LocalCopy(str(path)) if is_url(path) else None
        self.path = Path(path) if self.copy is None else self.copy.path
        self.place = str(path) if self.copy is None else self.copy.url
        description = read_description(self.path)
        self.spec: CacheSpec = description.spec
        self.description = description
        # First: the list proves how many clips there are, before memory is taken for each that a stranger claims.
        self.clips = read_clips(self.path, description)
        done = BlocksDone(self.path, self.spec, copy=self.copy)
        self._done: BlocksDone | GrownCache = done
        if done.index is not None:
            self.clips.know_labels(done.index.labels)
        check_labels(self.clips, self.spec, str(path))
        self.is_valid = self._done.is_valid
        self._layouts = array_layouts(self.spec)
        self._num_samples = self.spec.num_samples
        # A copy is told from a hole by its chunks' checksums: those are always checked.
        self._samples: SampleReader | GrownCache = SampleReader(
            self.path,
            self.spec,
            layouts=self._layouts,
            files=self._done.files,
            copy=self.copy,
            trust=trust and self.copy is None,
        )
        self.is_local = self.copy is None and self._samples.maps_files
        self._projections: Mapping[int, ProjectionOnDevices] | None = None
        base = base_member(self.path, description, self.clips, done, self._samples, self.copy)
        if grown and (whole := open_grown(base, str(path), trust=trust)) is not None:
            self._become(whole)

    def _become(self, grown: GrownCache) -> None:
        """Show what all members of a grown cache hold."""
        self._done = self._samples = grown
        self.spec, self.description, self.clips = grown.spec, grown.description, grown.clips
        self.is_valid, self._num_samples = grown.is_valid, self.spec.num_samples

    def __len__(self) -> int:
        """Return the number of samples, failed and unfinished ones included."""
        return self.spec.num_samples

    @cached_property
    def sample_clips(self) -> np.ndarray:
        """The clip's row of each sample, int64 (samples,); made at the first use."""
        return np.repeat(np.arange(self.spec.num_clips), self.spec.views.per_clip)

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of each sample, int64 (samples,); made at the first use."""
        return np.repeat(self.clips.labels.astype(np.int64), self.spec.views.per_clip)

    @property
    def name(self) -> str:
        """The last part of its place."""
        return self.place.rstrip("/").rpartition("/")[2]

    @property
    def is_complete(self) -> bool:
        """Whether every block is done."""
        return self.num_blocks_done == self.num_blocks

    @property
    def num_blocks(self) -> int:
        """Blocks in all, those of what was added to it too."""
        return self._done.num_blocks if isinstance(self._done, GrownCache) else self.spec.num_blocks

    @property
    def num_blocks_done(self) -> int:
        """Blocks with a valid mark."""
        return self._done.num_done if isinstance(self._done, GrownCache) else len(self._done.files)

    @property
    def members(self) -> tuple[Member, ...]:
        """The caches that a grown cache is read from, the base first; none for any other."""
        return self._done.members if isinstance(self._done, GrownCache) else ()

    @property
    def fingerprint(self) -> str:
        """The cache digest: the manifest's once complete; before that, a digest of the marks there are."""
        if isinstance(self._done, GrownCache):
            return self._done.fingerprint
        if (found := manifest_digest(self.path, self.spec)) is not None:
            return found
        manifest = find_manifest(self.path, self.spec)
        return self._done.marks_digest if manifest is None else manifest.digest

    @property
    def index_digest(self) -> str | None:
        """The cache digest that its index names; None where it was opened by its marks."""
        return None if self._done.index is None else self._done.index.cache_digest

    @property
    def has_manifest(self) -> bool:
        """Whether the manifest is written, intact and this cache's; of a grown cache, all of them."""
        if isinstance(self._done, GrownCache):
            return self._done.has_manifest
        is_proved = manifest_digest(self.path, self.spec) is not None
        return is_proved or manifest_at(self.path, self.spec) is not None

    @property
    def origin(self) -> Mapping[str, Any]:
        """What the cache was made with beside its spec: `root` of the videos, `model`, `pretrained`."""
        return self.description.origin

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Every failed clip of the blocks done: (clip id, reason)."""
        return [(self.clips[row].id, reason) for row, reason in sorted(self._done.errors.items())]

    @property
    def damaged_marks(self) -> Mapping[int, str]:
        """Why a block whose mark is not intact does not exist, by block."""
        return self._done.damaged_marks

    @property
    def provenance(self) -> Mapping[tuple[str, tuple[int, int]], int]:
        """Number of clips by (decoder, source (height, width))."""
        return self._done.provenance

    @property
    def by_older_rule(self) -> Mapping[int, str]:
        """The decoder of each clip with features whose frames a rule before this version's chose, by its row."""
        return self._done.by_older_rule

    @property
    def frame_rule(self) -> int:
        """The oldest rule by which frames of its clips were chosen."""
        return max(self.spec.frame_rule, FRAME_RULE if self.is_complete and not self.by_older_rule else 1)

    def refresh(self) -> None:
        """See blocks that were finished since the cache was opened."""
        self._done.refresh()

    def mark(self, block: int) -> Mark | None:
        """Return a block's mark; None where none is intact. Raises: CacheDamaged where the block is not read by it."""
        return self._done.intact_mark(block)

    def check_marks(self, samples: Indices) -> None:
        """Check that blocks of samples are not there, or whole and as the manifest has them. Raises: CacheDamaged."""
        self._done.check_samples(self.rows_of(samples))

    def layer_positions(self, layers: Sequence[int] | None) -> list[int]:
        """Return the places of layers in the arrays' layer axis. Raises: UsageError for one that is not stored."""
        wanted = self.spec.layers if layers is None else tuple(layers)
        missing = [layer for layer in wanted if layer not in self.spec.layers]
        if missing:
            raise UsageError(
                f"{self.place}: layers {missing} are not stored; it has {list(self.spec.layers)}"
            )
        return [self.spec.stored_layers.index(layer) for layer in wanted]

    def read(
        self, samples: Indices, layers: Sequence[int] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Return dequantised features, shallow to deep.

        Args:
            samples: rows, in any order; a slice; a mask of all samples, such as `is_valid`; or one row, which is read as
                a list of one.
            layers: layers of the tower, shallow to deep; all stored ones by default.

        Returns: float32 tokens, a (B, T, 1+P, C) for each layer; maps, a (B, 2, T-1, P, P) each, or None.
        Raises: CacheError for a sample that failed or is not extracted yet; CacheDamaged where bytes are not
            those that were written; UsageError for a sample or layer that does not exist, or for what is no such number.
        """
        return self.read_stored(
            samples, None if layers is None else Reads(layers=layers_of(layers))
        ).dequantized()

    def read_stored(self, samples: Indices, reads: Reads | None = None) -> StoredBatch:
        """Features as they are stored: all that are, or what `reads` says. `samples` and errors as `read`."""
        reads = reads or Reads(layers=self.spec.layers)
        rows = self.rows_of(samples)
        buffers = self.buffers(slots=len(rows), reads=reads)
        self.read_into(buffers, enumerate(rows.tolist()), reads.layers)
        return buffers.batch(len(rows))

    def rows_of(self, samples: Indices) -> np.ndarray[Any, Any]:
        """Return the rows of samples, int64 (M,), that `read` would read. Raises: UsageError as `read`."""
        return rows_of(samples, self._num_samples, what="sample", place=self.place)

    def buffers(
        self,
        *,
        slots: int,
        reads: Reads | None = None,
        pin_memory: bool = False,
        device: torch.device | None = None,
    ) -> BatchBuffers:
        """Buffers of all that is stored or of what `reads` says: for `read_into`, or on a device, to be copied into.

        Raises: UsageError for a layer that is not stored.
        """
        reads = reads or Reads(layers=self.spec.layers)
        names: tuple[str, ...] = () if reads.tokens == "class" else TOKEN_ARRAYS
        names += (MAP_ARRAYS if reads.with_maps else ()) + (() if reads.tokens == "all" else CLASS_ARRAYS)
        layouts = [layout for name, layout in self._layouts.items() if name in names]
        needs_projections = reads.with_maps and self.spec.recomputes_maps
        projected = self._projected_maps(reads.layers) if needs_projections else None
        count = len(self.layer_positions(reads.layers) if projected is None else projected.held)
        return BatchBuffers(
            layouts,
            num_layers=count,
            slots=slots,
            pin_memory=pin_memory,
            projected=projected,
            device=device or torch.device("cpu"),
        )

    def _projected_maps(self, wanted: tuple[int, ...]) -> ProjectedMaps:
        """Return how maps that are not stored are made. Raises: as `layer_positions`; CacheDamaged."""
        self.layer_positions(wanted)
        if self._projections is None:
            found = (
                read_projections(self.path, self.spec, self.description.projections_sha256)
                if not isinstance(self._done, GrownCache)
                else self._done.projections()
            )
            self._projections = {layer: ProjectionOnDevices(value) for layer, value in found.items()}
        held = tuple(sorted({layer - 1 for layer in wanted}.union(wanted)))
        return ProjectedMaps(wanted=wanted, held=held, projections=self._projections)

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
            self._samples.prefetch(samples, positions, buffers.stacked)

    def _positions(self, buffers: BatchBuffers, layers: Sequence[int] | None) -> Sequence[int]:
        positions = self.layer_positions(layers)
        if buffers.projected is None:
            return positions
        return [self.spec.stored_layers.index(layer) for layer in buffers.projected.held]

    def _read_positions(
        self, buffers: BatchBuffers, samples: Iterable[tuple[int, int]], positions: Sequence[int]
    ) -> None:
        positions = as_range(positions)
        stacks = [(name, stack, self._layouts[name].differenced) for name, stack in buffers.stacked.items()]
        for name, stack, _ in stacks:
            self._layouts[name].check_stack(stack, len(positions))
        self._samples.read(stacks, [(slot, self._checked_sample(s)) for slot, s in samples], positions)

    def close(self) -> None:
        """Let go of every open file; the next read opens what it needs again."""
        self._samples.close()

    def end_waits(self) -> None:
        """End what waits for a server now, in whatever thread: it raises WaitEnded. What is read later waits again."""
        self._samples.end_waits()

    def read_row(self, sample: int, positions: Sequence[int] | None = None) -> Row:
        """Return every array's chunks of one sample, as `make_row` made them. Errors as `read`.

        Args:
            positions: along the layer axis; all by default.
        """
        positions = range(len(self.spec.stored_layers)) if positions is None else positions
        buffers = BatchBuffers(list(self._layouts.values()), num_layers=len(positions), slots=1)
        self._read_positions(buffers, [(0, sample)], positions)
        return {name: np.concatenate(arrays) for name, arrays in buffers.arrays.items()}

    def read_class_tokens(self, samples: Indices, layers: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Return class tokens alone, float32, a (B, T, C) for each layer. Arguments and errors as `read`."""
        wanted = self.spec.layers if layers is None else layers_of(layers)
        stored = self.read_stored(samples, Reads(layers=wanted, with_maps=False, tokens="class"))
        return [tokens[:, :, 0].float() for tokens in stored.class_tokens or ()]

    def _checked_sample(self, sample: int) -> int:
        sample = row_of(sample, self._num_samples, what="sample", place=self.place)
        if not self.is_valid[sample]:
            raise self._done.why_not_served(sample, self.clips, self.place)
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_projections": None}  # tensors on this process's devices
