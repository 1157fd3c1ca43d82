"""The blocks of a cache that exist for readers: which are done, what lies in them, which clips failed and why."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from evl_cache.canonical_json import digest
from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import FRAME_RULE, CacheSpec
from evl_cache.store.format.index import Index, believed_index
from evl_cache.store.format.index_head import Table
from evl_cache.store.format.known_blocks import KnownBlocks
from evl_cache.store.format.layout import MANIFEST_NAME, mark_name, mark_path, marked_blocks
from evl_cache.store.format.manifest import find_manifest, manifest_digest
from evl_cache.store.format.marks import (
    UNKNOWN_DECODER,
    Mark,
    ShardFiles,
    parse_mark,
    read_mark,
    read_mark_bytes,
)
from evl_cache.store.reading.local_copy import LocalCopy


class DoneFiles(Mapping[int, ShardFiles]):
    """Records of the shards of the blocks that are done, by block. What an index has is read when it is asked for."""

    def __init__(self, cache_path: Path, spec: CacheSpec, copy: LocalCopy | None = None) -> None:
        self._cache_path, self._spec, self._copy = cache_path, spec, copy
        self._whole: Index | None = None
        self._indexed: dict[int, Index] = {}
        self._read: dict[int, ShardFiles] = {}

    def __getitem__(self, block: int) -> ShardFiles:
        if block in self._read:
            return self._read[block]
        index = self._index_of(block)
        try:
            return index.files(block)
        except CacheDamaged:
            if self._copy is not None:
                self._copy.keep_mark(block, index.file_digest(block))
            mark = read_mark(self._cache_path, block, self._spec)  # the truth, where its copy is damaged
            if mark is None or mark.file_digest != index.file_digest(block):
                raise
            self._read[block] = mark.files
            return mark.files

    def __contains__(self, block: object) -> bool:
        is_whole = self._whole is not None and isinstance(block, int) and 0 <= block < self._spec.num_blocks
        return is_whole or block in self._read or block in self._indexed

    def __iter__(self) -> Iterator[int]:
        blocks = (
            range(self._spec.num_blocks) if self._whole else sorted(self._read.keys() | self._indexed.keys())
        )
        return iter(blocks)

    def __len__(self) -> int:
        if self._whole is not None:
            return self._spec.num_blocks
        return len(self._read.keys() | self._indexed.keys())

    def note_all(self, index: Index) -> None:
        """Take all blocks from an index."""
        self._whole = index

    def note_indexed(self, block: int, index: Index) -> None:
        """Take a block from a segment, say."""
        self._indexed[block] = index

    def note_read(self, block: int, files: ShardFiles) -> None:
        """Take a block as its mark has it."""
        self._read[block] = files

    def _index_of(self, block: int) -> Index:
        if self._whole is not None and 0 <= block < self._spec.num_blocks:
            return self._whole
        return self._indexed[block]


class BlocksDone:
    """The blocks of a cache that exist for readers.

    A complete cache has an index, which says it all. Without one that can be believed, they are those with an intact
    mark.

    Args:
        copy: fetches what `cache_path` lacks, where it is a copy of a remote cache.

    Attributes:
        index: of the complete cache; None where marks were read.
        files: records of a block's shards, by block and array.
        is_valid: bool (samples,): extracted, and the clip did not fail.
        errors: why a clip failed, by its row.
        damaged_marks: why a block whose mark is not intact does not exist, by block.
        provenance: number of clips by (decoder, source (height, width)).
        by_older_rule: the decoder of each clip whose frames an older rule chose, by its row.
    """

    def __init__(self, cache_path: Path, spec: CacheSpec, *, copy: LocalCopy | None = None) -> None:
        self._cache_path, self._spec, self._copy = cache_path, spec, copy
        self.files = DoneFiles(cache_path, spec, copy)
        self.is_valid = np.zeros(spec.num_samples, dtype=bool)
        self.errors: dict[int, str] = {}
        self.damaged_marks: dict[int, str] = {}
        self.provenance: Counter[tuple[str, tuple[int, int]]] = Counter()
        self.by_older_rule: dict[int, str] = {}
        self._file_sha256s: dict[int, str] = {}
        self._digests: dict[int, str] = {}
        self._known: KnownBlocks | None = None
        self.index = believed_index(cache_path, spec) if copy is None else copy.index
        if self.index is not None:
            self.files.note_all(self.index)
            self._admit_clips(0, self.index.clips, self.index.texts)
        self.refresh()

    @property
    def marks_digest(self) -> str:
        """Digest of the marks there are."""
        if self.index is not None:
            return digest([self.index.mark_digest(block) for block in range(self._spec.num_blocks)])
        return digest([self._digests[block] for block in sorted(self._digests)])

    def refresh(self) -> None:
        """See blocks that were finished since the last look."""
        if self.index is not None:
            return
        if self._known is None:
            self._known = KnownBlocks(self._cache_path, self._spec)
        else:
            self._known.refresh()
        for block in sorted(marked_blocks(self._cache_path) - self.files.keys()):
            if block >= self._spec.num_blocks:
                continue
            try:
                self._see(self._known, block)
            except CacheDamaged as error:
                self.damaged_marks[block] = str(error)

    def intact_mark(self, block: int) -> Mark | None:
        """Return a block's mark, which is fetched where it is not here; None where it has none that is intact.

        Raises: CacheDamaged where by the index it was another when the cache was opened; CacheError where it cannot be read.
        """
        try:
            mark = self.mark(block)
        except CacheDamaged:
            return None
        if mark is not None and self.index is not None and self.index.file_digest(block) != mark.file_digest:
            raise CacheDamaged(
                f"{mark_path(self._cache_path, block)}: is not the mark that the cache was opened by; if the cache was changed "
                "just now run the same command again, else repair the cache"
            )
        return mark

    def mark(self, block: int) -> Mark | None:
        """Return a block's mark as `intact_mark`. Raises: CacheDamaged where it is not intact; CacheError."""
        if self._copy is not None and self.index is not None:
            self._copy.keep_mark(block, self.index.file_digest(block))
        return read_mark(self._cache_path, block, self._spec)

    def _see(self, known: KnownBlocks, block: int) -> None:
        """Admit a block where it has an intact mark. Raises: CacheDamaged."""
        written = read_mark_bytes(self._cache_path, block, self._spec)
        if written is None:
            return
        if (index := known.knowing(block, written)) is None:
            self._admit(parse_mark(written, mark_path(self._cache_path, block), block, self._spec))
            return
        self._note(block, index.mark_digest(block), index.file_digest(block)[1])
        self.files.note_indexed(block, index)
        self._admit_clips(self._spec.clips_of_block(block).start, index.clips_of(block), index.texts)

    def check_samples(self, samples: np.ndarray) -> None:
        """Check the blocks of samples, int64 (M,), as `check` does, unless an index has proved all. Raises: CacheDamaged."""
        if not self.is_as_named:
            self.check(np.unique(samples // self._spec.block_samples).tolist())

    def check(self, blocks: Iterable[int]) -> None:
        """Check that the marks of blocks, where they have one, are intact, and those that the manifest names.

        Raises: CacheDamaged.
        """
        blocks = set(blocks)
        for block in sorted(blocks & self.damaged_marks.keys()):
            raise CacheDamaged(self.damaged_marks[block])
        manifest = find_manifest(self._cache_path, self._spec)
        if manifest is None:
            return
        for block in sorted(blocks & self.files.keys()):
            name = mark_name(block)
            if manifest.files.get(name, (0, ""))[1] != self._file_sha256_of(block):
                raise CacheDamaged(
                    f"{self._cache_path / name}: is not the mark that {MANIFEST_NAME} names; if the cache was changed just now "
                    "run the same command again, else repair the cache"
                )

    @property
    def is_as_named(self) -> bool:
        """Whether all blocks are as the manifest names them: by an index, as long as its manifest lies there."""
        index = self.index
        return index is not None and manifest_digest(self._cache_path, self._spec) == index.cache_digest

    def _file_sha256_of(self, block: int) -> str:
        return self._file_sha256s[block] if self.index is None else self.index.file_digest(block)[1]

    def why_not_served(self, sample: int, clips: Sequence[Clip], place: str) -> CacheError:
        """Return the error of asking for a sample that is not valid."""
        row = sample // self._spec.views.per_clip
        block = row // self._spec.block_clips
        if block in self.damaged_marks:
            return CacheDamaged(self.damaged_marks[block])
        if block not in self.files:
            return CacheError(
                f"sample {sample} of {place} is not extracted yet; run the extract command again"
            )
        return CacheError(
            f"sample {sample} of {place}: its clip {clips[row].id!r} failed ({self.errors[row]}); see is_valid"
        )

    def _note(self, block: int, mark_digest: str, file_sha256: str) -> None:
        self.damaged_marks.pop(block, None)
        self._digests[block], self._file_sha256s[block] = mark_digest, file_sha256

    def _admit(self, mark: Mark) -> None:
        self._note(mark.block, mark.digest, mark.file_digest[1])
        self.files.note_read(mark.block, mark.files)
        views = self._spec.views.per_clip
        for row, clip in zip(self._spec.clips_of_block(mark.block), mark.clips, strict=True):
            if clip.error is not None:
                self.errors[row] = clip.error
                continue
            self.is_valid[row * views : (row + 1) * views] = True
            if clip.is_by_older_rule(self._spec):
                self.by_older_rule[row] = clip.decoder or UNKNOWN_DECODER
            if clip.decoder is not None and clip.frame_size is not None:
                self.provenance[clip.decoder, (clip.frame_size[0], clip.frame_size[1])] += 1

    def _admit_clips(self, first: int, clips: Table, texts: Sequence[str]) -> None:
        """Admit the clips of an index, the first of which is in this row, as `_admit` does those of a mark."""
        views = self._spec.views.per_clip
        has_features = clips["error"] < 0
        self.is_valid[first * views : (first + len(clips)) * views] = np.repeat(has_features, views)
        failed = np.flatnonzero(~has_features)
        self.errors |= {first + row: texts[clips["error"][row]] for row in failed.tolist()}
        rule = np.where(clips["frame_rule"] > 0, clips["frame_rule"], self._spec.frame_rule)
        for row in np.flatnonzero(has_features & (rule < FRAME_RULE)).tolist():
            decoder = int(clips["decoder"][row])
            self.by_older_rule[first + row] = texts[decoder] if decoder >= 0 else UNKNOWN_DECODER
        told = clips[has_features & (clips["decoder"] >= 0) & (clips["height"] >= 0)]
        for (decoder, height, width), count in Counter(
            zip(*(told[name].tolist() for name in ("decoder", "height", "width")), strict=True)
        ).items():
            self.provenance[texts[decoder], (height, width)] += count
