"""The inner codecs of our shards, which encode and decode the bytes of one chunk, and their checksums.

Both codecs carry a checksum inside the published format, so that any Zarr v3 reader notices a flipped bit.
docs/architecture.md says why CRC-32C comes from awscrt.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
from numcodecs import zstd
from numpy.typing import DTypeLike, NDArray

from evl_cache.errors import CacheDamaged, UsageError
from evl_cache.store.disk.checksum import Buffer, crc32c

Array = NDArray[Any]

CRC_NBYTES = 4
# Large raw chunks start at even addresses, between which copies are up to a quarter faster.
ALIGNMENT, _ALIGNED_NBYTES = 64, 1 << 16
_SCRATCH = threading.local()
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def byte_view(data: Buffer) -> NDArray[np.uint8]:
    """Return the bytes of a contiguous buffer or array as uint8 of shape (nbytes,), without a copy."""
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:  # reshape would copy, and what is written to the copy is lost
            raise UsageError(f"array of shape {data.shape} is not C-contiguous: pass a contiguous one")
        return data.reshape(-1).view(np.uint8)
    return np.frombuffer(data, dtype=np.uint8)


def scratch(nbytes: int) -> NDArray[np.uint8]:
    """Return a buffer of this thread, kept between uses: fresh pages would cost as much as what is done in them."""
    kept: NDArray[np.uint8] | None = getattr(_SCRATCH, "buffer", None)
    if kept is None or kept.nbytes < nbytes:
        kept = _SCRATCH.buffer = np.empty(nbytes, np.uint8)
    return kept[:nbytes]


class EncodedChunk(NamedTuple):
    """A chunk as it is stored, and what `ChunkCodec.checksum` says of it."""

    stored: bytes
    checksum: int


@dataclass(frozen=True)
class ChunkCodec:
    """How chunks are stored: `zstd` (frames with checksum) or `raw` (the bytes, then their CRC-32C)."""

    name: str = "zstd"
    _: KW_ONLY
    zstd_level: int = 3

    def __post_init__(self) -> None:
        if self.name not in ("zstd", "raw"):
            raise UsageError(f"unknown chunk codec {self.name!r}: use 'zstd' or 'raw'")
        if not 1 <= self.zstd_level <= 22:
            raise UsageError(f"zstd_level is {self.zstd_level}: use 1 to 22")

    def encode(self, chunk: Array | memoryview) -> bytes:
        """Return the stored form of a chunk's values, little endian, in C order."""
        values = np.ascontiguousarray(chunk)
        payload = byte_view(values.astype(values.dtype.newbyteorder("<"), copy=False))
        if self.name == "raw":
            return b"".join((payload.data, crc32c(payload).to_bytes(CRC_NBYTES, "little")))
        return bytes(zstd.compress(payload, self.zstd_level, True))

    def encode_checked(self, chunk: Array | memoryview) -> EncodedChunk:
        """Return the stored form of a chunk with its checksum, taken while the bytes are in the processor's cache."""
        stored = self.encode(chunk)
        if self.name == "raw":  # its own checksum is the same number
            return EncodedChunk(stored, int.from_bytes(stored[-CRC_NBYTES:], "little"))
        return EncodedChunk(stored, crc32c(stored))

    def decode(self, encoded: Buffer, out: Array) -> None:
        """Fill `out` (C-contiguous, of the chunk's shape and dtype) from the stored form.

        Raises CacheDamaged unless `encoded` is intact and holds exactly `out.nbytes` bytes; `out` then holds
        anything. Allocates nothing that depends on what `encoded` claims about its size.
        """
        source, target = byte_view(encoded), byte_view(out)
        if self.name == "raw":
            if source.nbytes != target.nbytes + CRC_NBYTES:
                raise CacheDamaged(f"has {source.nbytes} bytes instead of {target.nbytes + CRC_NBYTES}")
            np.copyto(target, source[:-CRC_NBYTES])
            if crc32c(target) != int.from_bytes(source[-CRC_NBYTES:].tobytes(), "little"):
                raise CacheDamaged("does not match its inner CRC-32C")
            return
        _check_frame(source, target.nbytes)
        try:
            zstd.decompress(source, target)
        except (RuntimeError, ValueError) as error:
            raise CacheDamaged(f"is no intact zstd frame ({error})") from error

    def checksum(self, encoded: Buffer) -> int:
        """Return the checksum of a stored chunk that marks keep: the CRC-32C of its bytes.

        A `raw` chunk's trailing CRC-32C is left out: with it, every intact chunk has the same checksum (the
        residue of the code), and chunks that changed places would go unnoticed.
        """
        source = byte_view(encoded)
        return crc32c(source[:-CRC_NBYTES] if self.name == "raw" else source)

    def allows_size(self, encoded_nbytes: NDArray[np.uint64], chunk_nbytes: int) -> NDArray[np.bool_]:
        """Return for each stored size whether a chunk of `chunk_nbytes` bytes can have it."""
        if self.name == "raw":
            return np.asarray(encoded_nbytes == np.uint64(chunk_nbytes + CRC_NBYTES))
        # zstd's own bound is 1/256 more than the input, plus 64 for short ones and the frame; this is wider.
        largest = np.uint64(chunk_nbytes + chunk_nbytes // 128 + 1024)
        return np.asarray((encoded_nbytes > 0) & (encoded_nbytes <= largest))

    def place(self, end: int, encoded_nbytes: int) -> int:
        """Return where our writers put a chunk of so many stored bytes into a shard whose data end at `end`."""
        if self.name == "raw" and encoded_nbytes >= _ALIGNED_NBYTES:
            return end + -end % ALIGNMENT
        return end

    def starts(self, encoded_nbytes: Sequence[int]) -> NDArray[np.int64]:
        """Return where our writers put chunks of these stored sizes, and where the last one ends, (chunks+1,)."""
        starts, end = [], 0
        for nbytes in encoded_nbytes:
            start = self.place(end, nbytes)
            starts.append(start)
            end = start + nbytes
        return np.array([*starts, end], dtype=np.int64)

    def zarr_codecs(self, dtype: DTypeLike) -> list[dict[str, Any]]:
        """Return the inner codecs as Zarr v3 metadata; `dtype` decides whether an endianness has to be stated."""
        to_bytes: dict[str, Any] = {"name": "bytes"}
        if np.dtype(dtype).itemsize > 1:
            to_bytes["configuration"] = {"endian": "little"}
        if self.name == "raw":
            return [to_bytes, {"name": "crc32c"}]
        return [to_bytes, {"name": "zstd", "configuration": {"level": self.zstd_level, "checksum": True}}]


def _check_frame(frame: NDArray[np.uint8], expected_nbytes: int) -> None:
    """Refuse a zstd frame that does not declare exactly `expected_nbytes` of content, before decoding it.

    numcodecs allocates what the header claims, and leaves the rest of a larger output untouched.
    Header: RFC 8878, section 3.1.1.1.
    """
    head = frame[:18].tobytes()
    if len(head) < 6 or head[:4] != _ZSTD_MAGIC:
        raise CacheDamaged("is no zstd frame")
    descriptor = head[4]
    single_segment = bool(descriptor & 0x20)
    size_nbytes = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    if size_nbytes == 0 or not descriptor & 0x04:
        raise CacheDamaged("is a zstd frame without content size or checksum")
    start = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 3]
    declared = int.from_bytes(head[start : start + size_nbytes], "little") + (256 if size_nbytes == 2 else 0)
    if declared != expected_nbytes:
        raise CacheDamaged(f"declares {declared} bytes instead of {expected_nbytes}")
