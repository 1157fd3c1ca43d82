"""Codes of tokens and maps on a CPU, made in blocks that stay in a core's cache: the bits that `quantize` defines.

An item is one sample and layer: K tokens of C channels. A pass over a whole item reads it from memory, and quantising takes
about fourteen. Here an item is read three times, in blocks of tokens: for minima, maxima and sums of roots, for sizes of
tokens, for codes. Minima and maxima are the same in any order, and sums are added up in torch's order.
Items are shared among threads, each with torch operations of one thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

ItemT = TypeVar("ItemT")

STEPS = 255
INT8_MIN = -128

# A token of up to this many times the median size costs the others at most log2(1.5) bits, and keeps scale 1.
OUTLIER_RATIO = 1.5

# A channel that is zero except in one token has nearly no typical size. Without this floor that channel alone would make
# the token an enormous outlier, and its other channels would lose precision.
SMALLEST_TYPICAL_SHARE = 1.0 / 256.0

TINY = torch.finfo(torch.float32).tiny

# Values of a block: 0.4 MB of float32, of the 1 to 2 MB that a core's second cache holds. Smaller blocks cost more calls.
BLOCK_VALUES = 100_000

# Tokens that torch adds up one after another, whatever the vectors of the processor.
SUM_ROWS = 16

# Tokens whose minima and maxima are kept together; those of a group with an outlier are taken again.
GROUP_ROWS = 8

_local = threading.local()
_pools: dict[
    tuple[int, int], ThreadPoolExecutor
] = {}  # by process (a fork has no threads) and number of threads
_lock = threading.Lock()


class TokenItem(NamedTuple):
    """Tokens of an item, and where their codes go.

    Attributes:
        values: floating, (K, C).
        codes: int8 (K, C).
        affine: float32 (2, C).
        scale: float16 (K,); None where tokens have no scale.
    """

    values: Tensor
    codes: Tensor
    affine: Tensor
    scale: Tensor | None


class MapRows(NamedTuple):
    """Rows of attention maps, and where their codes go.

    Attributes:
        values: floating, (R, P).
        codes: uint8 (R, P).
        row_max: float16 (R,); NaN is written where a row cannot be stored.
    """

    values: Tensor
    codes: Tensor
    row_max: Tensor


def encode(items: Sequence[TokenItem | MapRows]) -> None:
    """Write the codes of every item; those of values that are not finite are of no use, and their scales not finite."""

    def one(item: TokenItem | MapRows) -> None:
        with torch.no_grad(), np.errstate(all="ignore"):  # both are set for each thread
            if isinstance(item, TokenItem):
                _encode_tokens(item)
            else:
                _encode_maps(item)

    for_each(one, items)


def for_each(function: Callable[[ItemT], None], items: Sequence[ItemT]) -> None:
    """Call a function with every item, in as many threads as torch would use for one operation."""
    workers = min(torch.get_num_threads(), len(items))
    if workers < 2 or getattr(
        _local, "is_worker", False
    ):  # a thread that waits for its own pool would wait forever
        for item in items:
            function(item)
    else:
        list(_pool(workers).map(function, items))


def float16_at_least(values: Tensor) -> Tensor:
    """Return the smallest float16 not below each of `values` (not negative), so that a row's codes never pass 255."""
    halves = values.to(torch.float16)
    next_up = (halves.view(torch.int16) + 1).view(torch.float16)  # adjacent bit patterns are adjacent numbers
    return torch.where(halves.float() < values, next_up, halves)


def inverse_or_zero(values: Tensor) -> Tensor:
    """Return 1/values, and 0 where they are 0."""
    return torch.where(values == 0, 0.0, 1.0 / values.clamp_min(TINY))


def outlier_scale(size: Tensor) -> Tensor:
    """Return float16 (..., K) of sizes (..., K): 1, or a token's size over the median size where it is an outlier."""
    usual = size.median(-1, keepdim=True).values
    ratio = size / torch.where(usual > 0, usual, 1.0)
    # `~(<=)` and not `>`: a token that is not finite must not count as ordinary.
    outlier = ~(ratio <= OUTLIER_RATIO) & ~(usual == 0)
    return torch.where(outlier, ratio, 1.0).to(torch.float16)


def _encode_tokens(item: TokenItem) -> None:
    values, codes, affine, scale = item
    blocks = _blocks(len(values), max(1, BLOCK_VALUES // values.shape[1] // SUM_ROWS) * SUM_ROWS)
    groups = _Groups(values)
    sizes = None if scale is None else _Sizes(values)
    for block in blocks:
        part = _float32(values[block], 0)
        groups.add(part)
        if sizes is not None:
            sizes.add(torch.abs(part, out=_space(part, 1)).sqrt_())
    outliers, outlier_values = None, None
    if scale is not None and sizes is not None:
        scale.copy_(outlier_scale(sizes.of_tokens(blocks, groups.largest())))
        outliers = (scale != 1).nonzero().squeeze(1)
        # The scale is the rounded one: decoding multiplies by it. A value divided by 1 is itself.
        outlier_values = values.index_select(0, outliers).float().div_(scale[outliers].float().unsqueeze(1))
        groups.replace(outliers, outlier_values)
    low = groups.low.amin(0)
    step = (groups.high.amax(0) - low) / STEPS
    # A constant channel (or one narrower than float32 can divide) gets step 0 and is its offset.
    step = torch.where(step < TINY, 0.0, step)
    inverse = torch.where(step == 0, 0.0, 1.0 / step)
    lowest = torch.full_like(low, INT8_MIN)
    for block in blocks:
        part = values[block]
        space = _space(part, 0)
        if part.dtype == torch.float32:
            torch.sub(part, low, out=space)
        else:
            space.copy_(part).sub_(low)
        codes[block].copy_(torch.addcmul(lowest, space, inverse, out=space).round_())
    if outliers is not None and outlier_values is not None and len(outliers):
        codes[outliers] = torch.addcmul(lowest, outlier_values.sub_(low), inverse).round_().to(torch.int8)
    affine[0] = step
    # Computed from the zeroed step: there every code is -128, and the offset must be the minimum itself.
    affine[1] = low - INT8_MIN * step


class _Groups:
    """Minima and maxima of each channel over groups of tokens, so that a few tokens can be replaced later.

    Attributes:
        low, high: float32 (groups, C).
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._filled = values, 0
        groups = -(-len(values) // GROUP_ROWS)
        self.low, self.high = torch.empty(2, groups, values.shape[1])

    def add(self, part: Tensor) -> None:
        """Add the next tokens, float32; all parts but the last are whole groups."""
        for tokens in _grouped(part, GROUP_ROWS):
            places = slice(self._filled, self._filled + len(tokens))
            torch.amin(tokens, 1, out=self.low[places])
            torch.amax(tokens, 1, out=self.high[places])
            self._filled += len(tokens)

    def largest(self) -> Tensor:
        """Return the largest magnitude of each channel, (C,)."""
        return torch.maximum(self.high.amax(0), self.low.amin(0).neg_())

    def replace(self, tokens: Tensor, values: Tensor) -> None:
        """Take other values for some tokens, whose places ascend: their groups are looked at again."""
        if not len(tokens):
            return
        groups = torch.unique_consecutive(tokens // GROUP_ROWS)
        rows = groups[:, None] * GROUP_ROWS + torch.arange(GROUP_ROWS)
        rows = rows.clamp_(max=len(self._values) - 1)  # of the last group: a token again changes no minimum
        again = self._values.index_select(0, rows.flatten()).float()
        places = torch.searchsorted(tokens, rows.flatten()).clamp_(max=len(tokens) - 1)
        is_other = tokens[places] == rows.flatten()
        again[is_other] = values[places[is_other]]
        again = _groups(again, GROUP_ROWS)
        self.low[groups], self.high[groups] = again.amin(1), again.amax(1)


class _Sizes:
    """Sizes of tokens, from roots of magnitudes that come in parts; see `quantize`."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._filled = values, 0
        self._sums = torch.empty(-(-len(values) // SUM_ROWS), values.shape[1])

    def add(self, roots: Tensor) -> None:
        """Add those of the next tokens; all parts but the last have a multiple of `SUM_ROWS`."""
        for part in _grouped(roots, SUM_ROWS):
            torch.sum(part, 1, out=self._sums[self._filled : self._filled + len(part)])
            self._filled += len(part)

    def of_tokens(self, blocks: Sequence[slice], largest: Tensor) -> Tensor:
        """Return them, float32 (K,). largest: magnitude of each channel, (C,)."""
        values = self._values
        typical = (_summed(self._sums, len(values)) / len(values)).square_()
        inverse = inverse_or_zero(torch.maximum(typical, largest.mul_(SMALLEST_TYPICAL_SHARE)))
        sizes = torch.empty(len(values))
        for block in blocks:
            part = values[block]
            space = _space(part, 0)
            if part.dtype == torch.float32:
                torch.mul(part, inverse, out=space)
            else:
                space.copy_(part).mul_(inverse)
            sizes[block] = torch.linalg.vector_norm(space.square_(), dim=-1)
        return sizes.sqrt_()


def _summed(sums: Tensor, tokens: int) -> Tensor:
    """Return (C,), the sum over all tokens in torch's order, from sums of each `SUM_ROWS` of them.

    torch adds 16 rows, one after another, then 16 such sums, then 16 of those, and what is left over of each at the end.
    """
    rest = [sums[-1]] if tokens % SUM_ROWS else []
    level = sums[: tokens // SUM_ROWS]
    total = rest[0] if rest else torch.zeros_like(sums[0])
    for _ in range(2):
        whole = len(level) // SUM_ROWS * SUM_ROWS
        above = _groups(level[:whole], SUM_ROWS).sum(1) if whole else level[:0]
        total = total + (level[whole:].sum(0) if whole < len(level) else 0.0)
        level = above
    for each in level[:1]:
        top = each.clone()
        for other in level[1:]:
            top += other
        total = total + top
    return total


def _encode_maps(item: MapRows) -> None:
    for block in _blocks(len(item.values), max(1, BLOCK_VALUES // item.values.shape[1])):
        part = item.values[block]
        space = _space(part, 0)
        if part.dtype != torch.float32:
            part = space.copy_(part)
        row_max = float16_at_least(part.amax(-1))
        if int(part.view(torch.int32).amin()) < 0:  # a sign: of a negative value, of -0 or of a NaN
            row_max[~(part.amin(-1) >= 0)] = torch.nan
        top = row_max.float()
        gain = torch.where(top > 0, STEPS / top.sqrt(), 0.0).unsqueeze(-1)
        torch.sqrt(part, out=space).mul_(gain)
        # Adding a half and cutting rounds; row_max >= every value, so 255.5 is never passed. numpy adds and cuts at once.
        np.add(space.numpy(), np.float32(0.5), out=item.codes[block].numpy(), casting="unsafe")
        item.row_max[block] = row_max


def _blocks(size: int, step: int) -> list[slice]:
    """Cut 0 .. size into blocks of `step`, the last one of up to twice that."""
    edges = [*range(0, max(size - step + 1, 1), step), size]
    return [slice(a, b) for a, b in pairwise(edges)]


def _groups(rows: Tensor, number: int) -> Tensor:
    return rows.reshape(-1, number, rows.shape[-1])


def _grouped(rows: Tensor, number: int) -> list[Tensor]:
    """Return rows (R, C) as groups of `number` (R // number, number, C) and the rest (1, R % number, C)."""
    whole = len(rows) // number * number
    parts = [_groups(rows[:whole], number)] if whole else []
    return parts if whole == len(rows) else [*parts, rows[None, whole:]]


def _float32(part: Tensor, which: int) -> Tensor:
    return part if part.dtype == torch.float32 else _space(part, which).copy_(part)


def _space(part: Tensor, which: int) -> Tensor:
    """Return this thread's float32 memory in the shape of `part`: new memory would cost as much as a pass over it."""
    name = f"values{which}"
    kept: np.ndarray[Any, Any] | None = getattr(_local, name, None)
    if kept is None or kept.size < part.numel():
        kept = np.empty(part.numel(), np.float32)
        setattr(_local, name, kept)
    return torch.from_numpy(kept)[: part.numel()].view(part.shape)


def _pool(workers: int) -> ThreadPoolExecutor:
    """Return threads whose torch operations stay in them.

    torch has one number for all new threads, so it is restored once these have begun.
    """
    key = (os.getpid(), workers)
    with _lock:
        if key not in _pools:
            before = torch.get_num_threads()
            begun = threading.Barrier(workers + 1)

            def begin() -> None:
                _local.is_worker = True
                torch.get_num_threads()  # the first question gives a thread the number of all, the next line its own
                torch.set_num_threads(1)
                begun.wait()

            pool = ThreadPoolExecutor(workers, "evl-cache-codes", initializer=begin)
            try:
                for _ in range(workers):
                    pool.submit(int)
                begun.wait()
            except BaseException:
                begun.abort()
                raise
            finally:
                torch.set_num_threads(before)
            _pools[key] = pool
        return _pools[key]
