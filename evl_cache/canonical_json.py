"""Write JSON as the standard has it; some of it the same for equal content, with digests of it."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from evl_cache.errors import NotFinite

_ENTRIES_AT_A_TIME = 4096


def json_text(content: object, *, indent: int | None = None) -> str:
    """Return JSON that any reader takes. All JSON that is written or printed, and not canonical, comes from here.

    Raises: NotFinite that names the first value that is NaN or infinite.
    """
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError as error:
        if (found := not_finite_in(content)) is None:
            raise
        raise NotFinite(f"{found}, which JSON has no number for: nothing is written of it") from error


def not_finite_in(content: object, name: str = "") -> str | None:
    """Return the first number in nested mappings and lists that is NaN or infinite, as `a.b is nan`, or None."""
    if isinstance(content, float):
        return None if math.isfinite(content) else f"{name or 'a value'} is {content}"
    if isinstance(content, Mapping):
        parts = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        parts = [(str(place), value) for place, value in enumerate(content)]
    else:
        return None
    told = (not_finite_in(value, f"{name}.{key}" if name else key) for key, value in parts)
    return next(filter(None, told), None)


def canonical_json(content: object) -> bytes:
    """Return UTF-8 JSON that is the same for equal content: sorted keys, no spaces, one newline at the end.

    The bytes of a name that are not UTF-8, which Python holds as lone surrogates, stand as JSON's escapes of these.

    Raises: ValueError for NaN and infinities.
    """
    return _canonical(content, allow_nan=False) + b"\n"


def digest(content: object) -> str:
    """Return the sha256 (hexadecimal) of canonical JSON without its newline; values may be NaN and infinities too."""
    return hashlib.sha256(_canonical(content, allow_nan=True)).hexdigest()


def digest_of_list(entries: Iterable[object]) -> str:
    """Return `digest` of a list of entries without making its text as a whole."""
    found, rest, before = hashlib.sha256(b"["), iter(entries), b""
    while part := list(islice(rest, _ENTRIES_AT_A_TIME)):
        found.update(before + _canonical(part, allow_nan=True)[1:-1])
        before = b","
    found.update(b"]")
    return found.hexdigest()


def signed_json(content: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return `canonical_json` of an object with its own digest as a further entry `digest`, and the digest.

    A large object is encoded once. It must have an entry whose name sorts after `digest`.
    """
    text = _canonical(content, allow_nan=False)
    first = {name: value for name, value in content.items() if name < "digest"}
    assert len(first) < len(content)
    at = (
        len(_canonical(first, allow_nan=False)) if first else 1
    )  # a comma stands where that has its last brace
    own = hashlib.sha256(text).hexdigest()
    return b"".join((text[:at], f'"digest":"{own}",'.encode(), text[at:], b"\n")), own


def digest_matches(content: Mapping[str, Any], written: bytes) -> bool:
    """Whether the entry `digest` of an object, which `written` was read as, is the digest of all its other entries."""
    stored = content.get("digest")
    # As we write it, the digest is that of the bytes without it: half the time of encoding the content again.
    without = written.removesuffix(b"\n").replace(f'"digest":"{stored}",'.encode(), b"", 1)
    if hashlib.sha256(without).hexdigest() == stored:
        return True
    return digest({name: value for name, value in content.items() if name != "digest"}) == stored


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, under names such as `a.b`."""
    out: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = value
    return out


def _canonical(content: object, *, allow_nan: bool) -> bytes:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=allow_nan)
    return text.encode(errors="backslashreplace")
