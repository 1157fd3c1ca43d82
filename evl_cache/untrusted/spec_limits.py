"""Check a cache's description before it is used, as it may come from a stranger.

The limits are far above what any tower or data set needs, and low enough that no number makes this process run out of
memory.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from evl_cache.errors import CacheError

# Of one decoded chunk, a sample's layer: enough for 64 frames of 448 pixels at patch 14 in float16.
MOST_CHUNK_NBYTES = 256 << 20
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]{1,200}")
COMPUTE_DTYPES = ("float32", "float16", "bfloat16")
_RANGES = {
    "num_clips": (1, 10**8),
    "block_clips": (1, 10**6),
    "frame_rule": (1, 10**6),
    "tower.image_size": (1, 16384),
    "tower.patch_size": (1, 16384),
    "tower.width": (1, 65536),
    "tower.blocks": (1, 4096),
    "tower.heads": (1, 65536),
    "tower.registers": (0, 65536),
    "views.frames": (1, 4096),
    "views.stride": (1, 10**6),
    "views.temporal_views": (1, 1000),
    "views.spatial_views": (1, 3),
    "views.train_views": (0, 1000),
    "views.augment_seed": (0, 2**63),
    "views.first_view": (0, 10**6),
}
_TEXTS = (
    "tokens", "maps", "codec", "compute_dtype", "preprocessing", "content_id", "tower.model", "tower.pretrained",
    "tower.weights_sha256", "views.sampling", "chunk_keys",
)  # fmt: skip
_MOST_CLASSES, _MOST_TEXT = 10**6, 1000
_MOST_SAMPLES = 10**9


def check_spec(content: Any) -> None:
    """Check types and sizes of a description's spec, given as JSON values; missing fields are not checked.

    Raises: CacheError naming the field that is wrong.
    """
    if not isinstance(content, Mapping):
        raise _wrong("spec", content, "an object")
    parts: dict[str, Any] = dict(content)
    for part in ("tower", "views"):
        values = content.get(part, {})
        if not isinstance(values, Mapping):
            raise _wrong(part, values, "an object")
        parts |= {f"{part}.{name}": value for name, value in values.items()}
    for name, (least, most) in _RANGES.items():
        value = parts.get(name, least)
        is_word = name == "views.stride" and (value is None or value == "auto")
        if not is_word and not (_is_int(value) and least <= value <= most):
            raise _wrong(name, value, f"a whole number of {least} to {most}")
    for name in _TEXTS:
        if not isinstance(parts.get(name, ""), str) or len(parts.get(name, "")) > _MOST_TEXT:
            raise _wrong(name, parts.get(name), "a short text")
    for name in ("dataset", "split"):
        value = parts.get(name, "x")
        if not isinstance(value, str) or not _NAME.fullmatch(value) or value.startswith("."):
            raise _wrong(name, value, "a plain name")
    if parts.get("compute_dtype", "float32") not in COMPUTE_DTYPES:
        raise _wrong("compute_dtype", parts["compute_dtype"], f"one of {', '.join(COMPUTE_DTYPES)}")
    _check_lists(parts)
    _check_sizes(parts)


def _check_lists(parts: Mapping[str, Any]) -> None:
    classes = parts.get("classes", [])
    if not isinstance(classes, list) or len(classes) > _MOST_CLASSES or not all(map(_is_text, classes)):
        raise _wrong("classes", classes, "a list of names")
    layers = parts.get("layers", [1])
    if not isinstance(layers, list) or not layers or not all(map(_is_int, layers)):
        raise _wrong("layers", layers, "a list of layers")
    deepest = parts.get("tower.blocks", layers[-1])
    if layers != sorted(set(layers)) or layers[0] < 1 or layers[-1] > deepest:
        raise _wrong("layers", layers, f"different layers of 1 to {deepest}, ascending")
    for name in ("tower.mean", "tower.std"):
        values = parts.get(name, [0.5] * 3)
        if not isinstance(values, list) or len(values) != 3 or not all(map(_is_finite, values)):
            raise _wrong(name, values, "three numbers")


def _check_sizes(parts: Mapping[str, Any]) -> None:
    side = parts.get("tower.image_size", 1) // parts.get("tower.patch_size", 1)
    frames, width = parts.get("views.frames", 1), parts.get("tower.width", 1)
    token_nbytes = 1 if parts.get("tokens") == "int8" else 2
    map_nbytes = 1 if parts.get("maps") == "uint8" else 2
    chunks = {"tokens": frames * (1 + side**2) * width * token_nbytes}
    if parts.get("maps") in ("uint8", "fp16"):
        chunks["maps"] = 2 * (frames - 1) * side**4 * map_nbytes
    for name, nbytes in chunks.items():
        if nbytes > MOST_CHUNK_NBYTES:
            raise CacheError(
                f"the cache's description: a chunk of {name} would have {nbytes} bytes; expected at most "
                f"{MOST_CHUNK_NBYTES}"
            )
    views = parts.get("views.train_views", 0) or math.prod(
        parts.get(f"views.{name}", 1) for name in ("temporal_views", "spatial_views")
    )
    if parts.get("num_clips", 1) * views > _MOST_SAMPLES:
        raise _wrong("num_clips", parts["num_clips"], f"at most {_MOST_SAMPLES} samples")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT


def _wrong(name: str, value: Any, expected: str) -> CacheError:
    shown = repr(value)
    if isinstance(value, Sequence) and len(value) > 20:
        shown = f"{len(value)} {'characters' if isinstance(value, str) else 'entries'}"
    return CacheError(f"the cache's description: {name} is {shown[:80]}; expected {expected}")
