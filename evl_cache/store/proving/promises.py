"""What the marks of a cache promise of its files, in 40 bytes a file: a large cache has a million."""

from collections.abc import Callable, Iterator, Mapping
from heapq import merge
from pathlib import Path
from typing import NamedTuple

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheDamaged
from evl_cache.spec import CacheSpec
from evl_cache.store.format.layout import DONE_NAME, array_layouts, mark_name, mark_path
from evl_cache.store.format.marks import Mark, mark_of, parse_document, read_mark_bytes

_SIZE_NBYTES, _SHA_NBYTES = 8, 32
_FILE_NBYTES = _SIZE_NBYTES + _SHA_NBYTES
FileDigest = tuple[int, str]  # size, sha256


class MarkRead(NamedTuple):
    """A mark that was read.

    Attributes:
        mark: None where there is none that is intact.
        promise: of a mark that is intact, as `Promises` keep it.
        wrong: what is wrong with it.
    """

    mark: Mark | None = None
    promise: bytes = b""
    wrong: tuple[str, ...] = ()


def read_mark_whole(cache_path: Path, block: int, spec: CacheSpec) -> MarkRead:
    """Return a block's mark, and whether it is written as our writers do. Raises: CacheError where the disk refuses.

    A changed space or escape keeps the digest of what is in it, so its form is proved by writing it again.
    """
    path = mark_path(cache_path, block)
    try:
        written = read_mark_bytes(cache_path, block, spec)
        if written is None:
            return MarkRead()
        document = parse_document(written, path)
        mark = mark_of(document, written, path, block, spec)
        promise = b"".join(map(_packed, (mark.file_digest, *(file.digest for file in mark.files.values()))))
    except CacheDamaged as error:
        return MarkRead(wrong=(str(error),))
    except (ValueError, OverflowError) as error:
        return MarkRead(wrong=(f"{path}: promises a file that cannot be ({error}); repair the cache",))
    return MarkRead(mark, promise, () if written == canonical_json(document) else (not_canonical(path),))


def not_canonical(path: Path) -> str:
    """Return what is said of a document of another form than the one that is written."""
    return f"{path}: is not written as evl-cache writes it; repair the cache"


class Promises:
    """What intact marks promise: size and sha256 of their own files and of their blocks' shards.

    Attributes:
        arrays: names of the arrays, in the order of a block's shards.
    """

    def __init__(self, spec: CacheSpec) -> None:
        layouts = array_layouts(spec)
        self.arrays = tuple(layouts)
        shard_names = {name: layout.shard_name for name, layout in layouts.items()}
        self._names: dict[str, Callable[[int], str]] = {DONE_NAME: mark_name, **shard_names}
        self._packed: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def blocks(self) -> list[int]:
        """The blocks that have an intact mark, in ascending order."""
        return sorted(self._packed)

    def admit(self, block: int, promise: bytes) -> None:
        """Take in what the mark of a block promises."""
        self._packed[block] = promise

    def mark(self, block: int) -> FileDigest:
        """Return size and sha256 of a block's mark."""
        return _unpacked(self._packed[block], 0)

    def shard(self, block: int, array: int) -> FileDigest:
        """Return size and sha256 of a block's shard, by the place of its array."""
        return _unpacked(self._packed[block], array + 1)

    def nbytes(self, block: int) -> int:
        """Return the bytes of a block's shards."""
        return sum(self.shard(block, array)[0] for array in range(len(self.arrays)))

    def rows(self, description: Mapping[str, FileDigest]) -> Iterator[tuple[str, FileDigest]]:
        """Yield (name, digest) of all files as a manifest has them, in the order of their names.

        Args:
            description: the same of the files that describe the cache, which are few.
        """
        groups: dict[str, dict[str, FileDigest]] = {f"{directory}/": {} for directory in self._names}
        for name, digest in description.items():
            directory, slash, _ = name.partition("/")
            groups.setdefault(directory + slash, {})[name] = digest
        for group in sorted(groups):  # what is in one directory stands together
            yield from merge(sorted(groups[group].items()), self._rows_in(group.removesuffix("/")))

    def _rows_in(self, directory: str) -> Iterator[tuple[str, FileDigest]]:
        if directory not in self._names:
            return
        name_of, place = self._names[directory], list(self._names).index(directory)
        for name, block in sorted((name_of(block), block) for block in self._packed):
            yield name, _unpacked(self._packed[block], place)


def _packed(digest: FileDigest) -> bytes:
    size, sha256 = digest
    packed = bytes.fromhex(sha256)
    if len(packed) != _SHA_NBYTES or packed.hex() != sha256:
        raise ValueError(f"{sha256[:80]!r} is no sha256")
    return size.to_bytes(_SIZE_NBYTES, "little") + packed


def _unpacked(packed: bytes, place: int) -> FileDigest:
    start = place * _FILE_NBYTES
    size = int.from_bytes(packed[start : start + _SIZE_NBYTES], "little")
    return size, packed[start + _SIZE_NBYTES : start + _FILE_NBYTES].hex()
