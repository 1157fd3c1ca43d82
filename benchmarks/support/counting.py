"""How many bytes are read of caches and how many values are decoded, counted where it happens."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor

from evl_cache.heads import layer_tokens
from evl_cache.heads.decoder.tensors import StoredMaps, StoredTokens
from evl_cache.store.reading.sample_reader import SampleReader


@dataclass(kw_only=True)
class Work:
    """read: bytes of samples, decompressed. decoded: values made of 8-bit codes."""

    read: int = 0
    decoded: int = 0


@contextmanager
def counted() -> Iterator[Work]:
    """Count what this process reads and decodes until the end of the block."""
    work = Work()
    read, load_tokens, load_maps = SampleReader.read_sample, StoredTokens.load, StoredMaps.load
    whole, whole_maps = layer_tokens._decoded, layer_tokens.decoded_maps

    def read_sample(cache: Any, stacks: Any, slot: int, sample: int, positions: Any) -> None:
        work.read += sum(stack[:, slot].nbytes for _, stack, _ in stacks)
        read(cache, stacks, slot, sample, positions)

    def load_chunk(stored: StoredTokens, places: slice, out: Tensor) -> Tensor:
        work.decoded += out.numel() * (stored.affine is not None)
        return load_tokens(stored, places, out)

    def load_rows(stored: StoredMaps, direction: int, patches: slice, out: Tensor) -> Tensor:
        work.decoded += out.numel() * (stored.row_max is not None)
        return load_maps(stored, direction, patches, out)

    def decoded(stored: Any) -> Tensor:
        work.decoded += 0 if isinstance(stored, Tensor) else stored.codes.numel()
        return whole(stored)

    def decoded_maps(stored: Any, dtype: Any) -> Tensor:
        work.decoded += 0 if isinstance(stored, Tensor) else stored.codes.numel()
        return whole_maps(stored, dtype)

    with ExitStack() as patches:
        for target, name, counting in (
            (SampleReader, "read_sample", read_sample),
            (StoredTokens, "load", load_chunk),
            (StoredMaps, "load", load_rows),
            (layer_tokens, "_decoded", decoded),
        ):
            patches.enter_context(mock.patch.object(target, name, counting))
        patches.enter_context(mock.patch("evl_cache.sweep.shared_batch.decoded_maps", decoded_maps))
        yield work
