"""Codes of tokens and maps on a CPU, by compiled loops: the bits that `quantize` defines by whole operations.

An item is one sample and layer: K tokens of C channels. A pass over a whole item reads it from memory, and quantising by
torch takes about fourteen. Here an item is read three times: for minima, maxima and sums of roots, for sizes of tokens,
for codes. Minima and maxima are the same in any order, and sums are added up in torch's order.
Items are shared among threads, each with torch operations of one thread.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
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


@functools.cache
def is_compiled() -> bool:
    """Whether this Python has the compiled loops: without numba `quantize` does it all by torch, in about twice the time."""
    if importlib.util.find_spec("numba") is None or os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return False
    try:
        _kernels()
    except ImportError as error:  # of a numpy that is newer than numba knows, say
        told = f"features are quantised slowly, as numba cannot be used: {error}"
        warnings.warn(told, RuntimeWarning, stacklevel=2)
        return False
    return True


def _kernels() -> ModuleType:
    from evl_cache.cpu_codes import kernels

    return kernels


def encode(items: Sequence[TokenItem | MapRows]) -> None:
    """Write the codes of every item; those of values that are not finite are of no use, and their scales not finite."""

    def one(item: TokenItem | MapRows) -> None:
        with torch.no_grad():  # set for each thread
            if isinstance(item, TokenItem):
                _encode_tokens(item)
            else:
                _encode_maps(item)

    for_each(one, items)


def for_each(function: Callable[[ItemT], None], items: Sequence[ItemT]) -> None:
    """Call a function with every item, in as many threads as torch would use for one operation."""
    workers = min(torch.get_num_threads(), len(items)) if is_compiled() else 1  # torch has threads of its own
    # A thread that waits for its own pool would wait forever.
    if workers < 2 or getattr(_local, "is_worker", False):
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
    kernels, values = _kernels(), item.values.float().contiguous().numpy()
    tokens, channels = values.shape
    low, high = _space("ranges", 2, -(-tokens // kernels.GROUP_ROWS), channels)
    sums = _space("sums", -(-tokens // kernels.SUM_ROWS), channels)
    total, inverse = _space("channels", 2, channels)
    _scan(values, low, high, sums)
    kernels.total_of_sums(sums, tokens, total)
    if item.scale is None:
        scale = np.ones(tokens, np.float32)
    else:
        kernels.typical_inverses(low, high, total, tokens, SMALLEST_TYPICAL_SHARE, inverse)
        item.scale.copy_(outlier_scale(torch.from_numpy(_norms(values, inverse)).sqrt_()))
        scale = item.scale.float().numpy()  # the rounded one: decoding multiplies by it
    kernels.ranges(values, scale, low, high, item.affine.numpy())
    least, most = item.affine.unbind()
    step = (most - least) / STEPS
    # A constant channel (or one narrower than float32 can divide) gets step 0 and is its offset.
    step = torch.where(step < TINY, 0.0, step)
    gain = torch.where(step == 0, 0.0, 1.0 / step)
    kernels.codes(values, scale, least.numpy(), gain.numpy(), kernels.torch_fuses, item.codes.numpy())
    # Computed from the zeroed step: there every code is -128, and the offset must be the minimum itself.
    torch.sub(least, INT8_MIN * step, out=most)
    # Minima and maxima pass over a NaN, sums do not.
    least.copy_(torch.where(torch.from_numpy(total).isfinite(), step, torch.nan))


def _scan(values: Floats, low: Floats, high: Floats, sums: Floats) -> None:
    """Write minima and maxima of groups, and sums of roots of magnitudes, in blocks that stay in a core's cache."""
    kernels, (tokens, channels) = _kernels(), values.shape
    step = max(1, BLOCK_VALUES // channels // kernels.SUM_ROWS) * kernels.SUM_ROWS
    space = _space("block", min(step, tokens), channels)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        roots = space[: part.stop - start]
        groups, places = (
            slice(start // rows, -(-part.stop // rows)) for rows in (kernels.GROUP_ROWS, kernels.SUM_ROWS)
        )
        kernels.scan(values[part], low[groups], high[groups], roots)
        torch.from_numpy(roots).sqrt_()
        kernels.sums_of_rows(roots, sums[places])


def _norms(values: Floats, inverse: Floats) -> Floats:
    """Return the norm of squares of values (K, C) times inverse (C,), of each token: (K,)."""
    kernels, (tokens, channels) = _kernels(), values.shape
    norms = np.empty(tokens, np.float32)
    if kernels.sums_as_torch and channels % kernels.LANES == 0:
        kernels.norms_of_squares(values, inverse, norms)
        return norms
    step = max(1, BLOCK_VALUES // channels)
    space = _space("block", min(step, tokens), channels)
    for start in range(0, tokens, step):
        part = space[: min(step, tokens - start)]
        kernels.squares(values[start : start + step], inverse, part)
        norms[start : start + step] = torch.linalg.vector_norm(torch.from_numpy(part), dim=-1).numpy()
    return norms


def _encode_maps(item: MapRows) -> None:
    kernels, values = _kernels(), item.values.float().contiguous()
    largest = torch.empty(len(values))
    least_bits = kernels.largest_of_rows(values.view(torch.int32).numpy(), largest.view(torch.int32).numpy())
    row_max = float16_at_least(largest)
    if least_bits < 0:  # a sign: of a negative value, of -0 or of a NaN
        row_max = float16_at_least(values.amax(-1))
        row_max[~(values.amin(-1) >= 0)] = torch.nan
    top = row_max.float()
    gain = torch.where(top > 0, STEPS / top.sqrt(), 0.0)
    # row_max >= every value, so 255.5 is never passed.
    step = max(1, BLOCK_VALUES // values.shape[1])
    space = torch.from_numpy(_space("block", min(step, len(values)), values.shape[1]))
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        roots = torch.sqrt(values[part], out=space[: len(values[part])])
        kernels.map_codes(roots.numpy(), gain[part].numpy(), item.codes[part].numpy())
    item.row_max.copy_(row_max)


def _space(name: str, *shape: int) -> Floats:
    """Return this thread's memory of a name: new memory would cost as much as a pass over it."""
    kept: Floats | None = getattr(_local, name, None)
    size = math.prod(shape)
    if kept is None or kept.size < size:
        kept = np.empty(size, np.float32)
        setattr(_local, name, kept)
    return kept[:size].reshape(shape)


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
