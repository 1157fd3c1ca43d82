"""The blocks of a cache as its marks say: which are done, what lies in them, which clips failed and why."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from evl_cache.canonical_json import digest
from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.format.layout import MANIFEST_NAME, mark_name, marked_blocks
from evl_cache.store.format.manifest import find_manifest
from evl_cache.store.format.marks import UNKNOWN_DECODER, Mark, ShardFiles, read_mark


class BlocksDone:
    """The blocks of a cache that exist for readers: those with an intact mark.

    Attributes:
        files: records of a block's shards, by block and array.
        is_valid: bool (samples,): extracted, and the clip did not fail.
        errors: why a clip failed, by its row.
        damaged_marks: why a block whose mark is not intact does not exist, by block.
        file_sha256s: digests of the marks' files, by block.
        provenance: number of clips by (decoder, source (height, width)).
        by_older_rule: the decoder of each clip whose frames an older rule chose, by its row.
    """

    def __init__(self, cache_path: Path, spec: CacheSpec) -> None:
        self._cache_path, self._spec = cache_path, spec
        self.files: dict[int, ShardFiles] = {}
        self.is_valid = np.zeros(spec.num_samples, dtype=bool)
        self.errors: dict[int, str] = {}
        self.damaged_marks: dict[int, str] = {}
        self.provenance: Counter[tuple[str, tuple[int, int]]] = Counter()
        self.by_older_rule: dict[int, str] = {}
        self.file_sha256s: dict[int, str] = {}
        self._digests: dict[int, str] = {}
        self.refresh()

    @property
    def marks_digest(self) -> str:
        """Digest of the marks there are."""
        return digest([self._digests[block] for block in sorted(self._digests)])

    def refresh(self) -> None:
        """See blocks that were finished since the last look."""
        for block in sorted(marked_blocks(self._cache_path) - self.files.keys()):
            if block >= self._spec.num_blocks:
                continue
            try:
                mark = read_mark(self._cache_path, block, self._spec)
            except CacheDamaged as error:
                self.damaged_marks[block] = str(error)
                continue
            if mark is not None:
                self._admit(mark)

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
        for block in sorted(blocks & self.file_sha256s.keys()):
            name = mark_name(block)
            if manifest.files.get(name, (0, ""))[1] != self.file_sha256s[block]:
                raise CacheDamaged(
                    f"{self._cache_path / name}: is not the mark that {MANIFEST_NAME} names; if the cache was changed just now "
                    "run the same command again, else repair the cache"
                )

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

    def _admit(self, mark: Mark) -> None:
        self.damaged_marks.pop(mark.block, None)
        self.files[mark.block], self._digests[mark.block] = mark.files, mark.digest
        self.file_sha256s[mark.block] = mark.file_digest[1]
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
