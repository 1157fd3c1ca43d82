"""Rows made of a whole batch of features: on a GPU in few launches and one wait, on a CPU one thread a chunk.

B samples of a batch, S of them at once, T frames, P patches, N = 1+P tokens, C channels, L layers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evl_cache import quantize
from evl_cache.cpu_codes import for_each
from evl_cache.errors import ClipError
from evl_cache.quantize import HALVES_EXPECTED, MAPS_EXPECTED, TOKENS_EXPECTED, not_storable
from evl_cache.spec import CacheSpec
from evl_cache.store.format.rows import Row

ALIGNMENT = 64  # bytes, of the arrays within a buffer
PROOFS = "proofs"


class FeaturesOverflow(ClipError):
    """Features computed in float16 are not finite: a remedy is to compute in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where arrays of S samples lie in one buffer.

    Attributes:
        arrays: name -> dtype and shape of a sample's array, (L, *chunk).
        proofs: numbers of a sample that are finite where it can be stored.
    """

    arrays: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    proofs: int

    @classmethod
    def of(cls, tokens: Sequence[Tensor], maps: Sequence[Tensor], spec: CacheSpec) -> "_Layout":
        L, (T, N, C) = len(tokens), tokens[0].shape[1:]
        is_int8 = spec.tokens == "int8"
        arrays: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "class_tokens": (torch.float16, (L, T, C)),
            "tokens": (torch.int8 if is_int8 else torch.float16, (L, T, N, C)),
        }
        if is_int8:
            arrays["token_affine"] = (torch.float32, (L, 2, C))
            arrays["token_scale"] = (torch.float16, (L, T, N))
        if maps:
            shape = (len(maps), *maps[0].shape[1:])
            is_uint8 = spec.maps == "uint8"
            arrays["maps"] = (torch.uint8 if is_uint8 else torch.float16, shape)
            if is_uint8:
                arrays["map_scale"] = (torch.float16, shape[:-1])
        return cls(arrays=arrays, proofs=sum(dtype.is_floating_point for dtype, _ in arrays.values()))

    def nbytes(self, samples: int) -> int:
        return sum(_aligned(_nbytes(dtype, (samples, *shape))) for _, dtype, shape in self._parts())

    def views(self, buffer: Tensor, samples: int) -> dict[str, Tensor]:
        """Return the arrays (S, L, *chunk) in a buffer of bytes, and `PROOFS`, float32 (S, proofs)."""
        found, start = {}, 0
        for name, dtype, shape in self._parts():
            size = _nbytes(dtype, (samples, *shape))
            found[name] = buffer[start : start + size].view(dtype).view(samples, *shape)
            start += _aligned(size)
        return found

    def _parts(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        for name, (dtype, shape) in self.arrays.items():
            yield name, dtype, shape
        yield PROOFS, torch.float32, (self.proofs,)


def make_rows(
    tokens: Sequence[Tensor], maps: Sequence[Tensor] | None, spec: CacheSpec
) -> list[Row | ClipError]:
    """Return the row of each sample of a batch, or why its features cannot be stored.

    A row's arrays share memory with others of it, and on a GPU with other rows.

    Args:
        tokens: (B, T, N, C) of each stored layer.
        maps: L of (B, 2, T-1, P, P), or None where the spec stores none.
    """
    assert not spec.stores_maps or maps is not None
    tokens = [each.detach() for each in tokens]
    maps = [each.detach() for each in maps or ()] if spec.stores_maps else []
    device = tokens[0].device
    made = _on_cpu(tokens, maps, spec) if device.type == "cpu" else begin_rows(tokens, maps, spec)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    found: list[Row | ClipError] = []
    for arrays in made:
        values = {name: array.numpy() for name, array in arrays.items()}
        proofs = np.isfinite(values.pop(PROOFS))
        for place in range(len(proofs)):
            row = {name: array[place] for name, array in values.items()}
            sample = len(found)
            features = (each[sample] for each in (*tokens, *maps))
            found.append(row if proofs[place].all() else _error(row, features, spec))
    return found


def make_row(tokens: Sequence[Tensor], maps: Sequence[Tensor] | None, spec: CacheSpec) -> Row:
    """Return the row of one sample.

    Args:
        tokens: (T, N, C) of each stored layer.
        maps: L of (2, T-1, P, P), or None where the spec stores none.

    Raises: ClipError where a feature is not finite or cannot be represented.
    """
    batched = None if maps is None else [each[None] for each in maps]
    (row,) = make_rows([each[None] for each in tokens], batched, spec)
    if isinstance(row, ClipError):
        raise row
    return row


def begin_rows(tokens: Sequence[Tensor], maps: Sequence[Tensor], spec: CacheSpec) -> list[dict[str, Tensor]]:
    """Return arrays of the processor's memory, which are filled once the device has done what was started here.

    Nothing waits for the device. Samples are taken as many at a time as `DEVICE_PASS_VALUES` allows: their codes are
    made in one buffer there, whose memory serves the next ones, and copied by one transfer into page-locked memory.
    """
    device, layout = tokens[0].device, _Layout.of(tokens, maps, spec)
    step = max(1, quantize.DEVICE_PASS_VALUES // max(1, len(tokens) * math.prod(tokens[0].shape[1:])))
    found = []
    for start in range(0, len(tokens[0]), step):
        samples = min(step, len(tokens[0]) - start)
        part = slice(start, start + samples)
        buffer = torch.empty(layout.nbytes(samples), dtype=torch.uint8, device=device)
        arrays = layout.views(buffer, samples)
        chunks = {name: array.flatten(0, 1) for name, array in arrays.items() if name != PROOFS}
        _encode_tokens(torch.stack([each[part] for each in tokens], 1).flatten(0, 1), chunks)
        if maps:
            _encode_maps(torch.stack([each[part] for each in maps], 1).flatten(0, 1), chunks)
        _note_proofs(arrays)
        copy = torch.empty(buffer.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        copy.copy_(buffer, non_blocking=True)
        found.append(layout.views(copy, samples))
    return found


def _on_cpu(tokens: Sequence[Tensor], maps: Sequence[Tensor], spec: CacheSpec) -> list[dict[str, Tensor]]:
    """Return arrays of each sample, in memory of its own, chunks made by many threads."""
    layout = _Layout.of(tokens, maps, spec)
    # numpy asks for huge pages: first writes to memory in small ones cost as much as a pass over it.
    buffers = [torch.from_numpy(np.empty(layout.nbytes(1), np.uint8)) for _ in tokens[0]]
    found = [layout.views(buffer, 1) for buffer in buffers]

    def make_chunk(place: tuple[int, Sequence[Tensor], int]) -> None:
        sample, features, layer = place
        chunk = {name: array[0, layer : layer + 1] for name, array in found[sample].items() if name != PROOFS}
        encode = _encode_tokens if features is tokens else _encode_maps
        encode(features[layer][sample : sample + 1], chunk)

    chunks = [
        (sample, features, layer)
        for sample in range(len(found))
        for features in (tokens, maps)
        for layer in range(len(features))
    ]
    if math.prod(tokens[0].shape[1:]) < quantize.SMALL_ITEM_VALUES:
        for chunk in chunks:  # a thread costs more than it saves
            make_chunk(chunk)
    else:
        for_each(make_chunk, chunks)
    for arrays in found:
        _note_proofs(arrays)
    return found


def _encode_tokens(tokens: Tensor, chunks: Mapping[str, Tensor]) -> None:
    """Write what is stored of tokens (I, T, N, C) into chunks (I, ...)."""
    chunks["class_tokens"].copy_(tokens[:, :, 0])
    if "token_affine" not in chunks:
        chunks["tokens"].copy_(tokens)
        return
    quantize.encode_tokens(
        tokens.flatten(1, 2),
        chunks["tokens"].flatten(1, 2),
        chunks["token_affine"],
        chunks["token_scale"].flatten(1),
    )


def _encode_maps(maps: Tensor, chunks: Mapping[str, Tensor]) -> None:
    """Write what is stored of attention maps (I, 2, T-1, P, P) into chunks (I, ...)."""
    if "map_scale" not in chunks:
        chunks["maps"].copy_(maps)
        return
    patches = maps.shape[-1]
    codes = chunks["maps"].view(-1, patches)
    quantize.encode_maps(maps.reshape(-1, patches), codes, chunks["map_scale"].view(-1))


def _note_proofs(arrays: Mapping[str, Tensor]) -> None:
    """Write for each sample numbers that are finite where its arrays are, so that it is known without a look at these."""
    # The float32 sum of finite float16 values is finite.
    proofs = [
        array.flatten(1).sum(1, dtype=torch.float32)
        for array in arrays.values()
        if array.dtype == torch.float16
    ]
    if "token_affine" in arrays:
        proofs.append(arrays["token_affine"].abs().flatten(1).amax(1))  # a sum of large float32 is infinite
    torch.stack(proofs, 1, out=arrays[PROOFS])


def _error(row: Row, features: Iterator[Tensor], spec: CacheSpec) -> ClipError:
    """Return why a row cannot be stored."""
    error = _first_fault({name: torch.from_numpy(array) for name, array in row.items()})
    if spec.compute_dtype != "float16" or all(bool(each.isfinite().all()) for each in features):
        return error
    return FeaturesOverflow(
        f"{str(error).partition(' cannot be stored')[0]} cannot be stored: got values that are not finite, expected "
        "finite ones; float16 does not hold what this tower computes: use --compute-dtype bfloat16"
    )


def _first_fault(row: Mapping[str, Tensor]) -> ClipError:
    """Return the error that names the first value or chunk that cannot be stored."""
    bad = ~row["class_tokens"].isfinite()
    if bool(bad.any()):
        return not_storable(bad, "class tokens", HALVES_EXPECTED)
    if "token_affine" in row:
        finite = (row[name].isfinite().flatten(1).all(1) for name in ("token_affine", "token_scale"))
        bad, expected = ~(next(finite) & next(finite)), TOKENS_EXPECTED
    else:
        bad, expected = ~row["tokens"].isfinite(), HALVES_EXPECTED
    if bool(bad.any()):
        return not_storable(bad, "tokens", expected)
    if "map_scale" in row:
        return not_storable(~row["map_scale"].isfinite(), "attention maps", MAPS_EXPECTED)
    return not_storable(~row["maps"].isfinite(), "attention maps", HALVES_EXPECTED)


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return dtype.itemsize * math.prod(shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
