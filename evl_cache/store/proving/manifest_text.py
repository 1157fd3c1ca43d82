"""The text that a manifest of these files has, made in parts: of a large cache the whole takes gigabytes as objects."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice

from evl_cache.canonical_json import canonical_json
from evl_cache.spec import CacheSpec
from evl_cache.store.format.manifest import MANIFEST_VERSION
from evl_cache.store.proving.promises import FileDigest

_NO_FILES = b'"files":{}'
_ROWS_A_PART = 5000
_DIGEST_NBYTES = len('"digest":"",') + 64


def proved_manifest(written: bytes, spec: CacheSpec, rows: Iterable[tuple[str, FileDigest]]) -> str | None:
    """Return the digest of a manifest in a file's bytes; None where these are not, to the last byte, what is written of files.

    Args:
        rows: name and digest of each file, in the order of their names.
    """
    parts = _unsigned_parts(spec, rows)
    head = next(parts)
    place, at = memoryview(written), len(head) + _DIGEST_NBYTES
    if place[: len(head)] != head:
        return None
    own = hashlib.sha256(head)
    for part in parts:
        if place[at : at + len(part)] != part:
            return None
        own.update(part)
        at += len(part)
    found = own.hexdigest()
    signed = place[len(head) : len(head) + _DIGEST_NBYTES] == f'"digest":"{found}",'.encode()
    return found if signed and written[at:] == b"\n" else None


def _unsigned_parts(spec: CacheSpec, rows: Iterable[tuple[str, FileDigest]]) -> Iterator[bytes]:
    """Yield what comes before a manifest's own digest, and then the rest of it."""
    first = canonical_json({"content_id": spec.content_id}).removesuffix(b"}\n") + b","
    rest = {"feature_id": spec.feature_id, "files": {}, "version": MANIFEST_VERSION}
    before, after = canonical_json(rest).removesuffix(b"\n").removeprefix(b"{").split(_NO_FILES)
    yield first
    yield before + _NO_FILES[:-1]
    comma, left = b"", iter(rows)
    while some := ",".join(_row(*row) for row in islice(left, _ROWS_A_PART)):
        yield comma + some.encode()
        comma = b","
    yield _NO_FILES[-1:] + after


def _row(name: str, digest: FileDigest) -> str:
    size, sha256 = digest
    return f'"{name}":{{"sha256":"{sha256}","size":{size}}}'
