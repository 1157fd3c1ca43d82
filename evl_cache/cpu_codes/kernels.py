"""Loops of `encoding`, compiled by numba: each reads its values from memory once. The bits are those of torch on this processor.

K tokens of C channels; P patches. Compiled at the first import, and then read from numba's cache, where it can write one.
Whether torch fuses a product with a sum, and in which order it sums up squares, depends on the processor: it is asked once.
Roots are torch's own: the library that it takes for many of them at once is off by a bit in one of 150.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
Floats = npt.NDArray[np.float32]

GROUP_ROWS = 8  # tokens whose minima and maxima are kept together
SUM_ROWS = 16  # tokens that torch adds up one after another, whatever the vectors of the processor
LANES = 8  # sums that torch keeps of a row

_MINIMUM = np.float32(-128.0)
_HALF = np.float32(0.5)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_TINY = np.finfo(np.float32).tiny
# Added and taken away again, it rounds what is smaller than 2**22 to whole numbers, ties to even.
_ROUNDING = np.float32(1.5 * 2**23)


def _compiled(signature: str) -> Callable[[FunctionT], FunctionT]:
    """Return a decorator that compiles a function, which lets other threads run beside."""

    def decorate(function: FunctionT) -> FunctionT:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
        try:
            return numba.njit(signature, cache=True, **options)(function)  # type: ignore[no-any-return]
        except (RuntimeError, OSError):  # numba finds no directory that it could write, or no room there
            return numba.njit(signature, **options)(function)  # type: ignore[no-any-return]

    return decorate


@intrinsic  # type: ignore[untyped-decorator]
def _fused(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    signature = numba.float32(numba.float32, numba.float32, numba.float32)
    return signature, lambda _, builder, __, arguments: builder.fma(*arguments)


@intrinsic  # type: ignore[untyped-decorator]
def _add_fourth_powers(context: Any, values: Any, inverse: Any, row: Any, sums: Any) -> Any:
    """Write into sums (LANES,) those of fourth powers of values[row] * inverse, of every LANES-th channel.

    In vectors written by hand: numba's compiler does not find them.
    """
    vector = ir.VectorType(ir.FloatType(), LANES)

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def array(place: int) -> Any:
            return target.make_array(signature.args[place])(target, builder, arguments[place])

        def load(pointer: Any, offset: Any) -> Any:
            address = builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())
            return builder.load(address, align=4)

        channels = builder.extract_value(array(0).shape, 1)
        lanes = ir.Constant(channels.type, LANES)
        start = builder.gep(array(0).data, [builder.mul(arguments[2], channels)])
        total = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * LANES))
        with cgutils.for_range(builder, builder.udiv(channels, lanes)) as loop:
            offset = builder.mul(loop.index, lanes)
            square = builder.fmul(load(start, offset), load(array(1).data, offset))
            square = builder.fmul(square, square)
            builder.store(builder.fadd(builder.load(total), builder.fmul(square, square)), total)
        address = builder.bitcast(array(3).data, vector.as_pointer())
        builder.store(builder.load(total), address, align=4)
        return target.get_dummy_value()

    return numba.void(values, inverse, row, sums), generate


@_compiled("void(f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1])")
def scan(values: Floats, low: Floats, high: Floats, magnitudes: Floats) -> None:
    """Write minima and maxima of each `GROUP_ROWS` tokens, of which the last may be fewer, and all magnitudes.

    Args:
        values, magnitudes: (K, C). low, high: (ceil(K / GROUP_ROWS), C), where a NaN is passed over.
    """
    tokens, channels = values.shape
    for group in range(low.shape[0]):
        first = group * GROUP_ROWS
        if first + GROUP_ROWS <= tokens:  # the compiler unrolls the inner loop, whose length it knows
            for channel in range(channels):
                least = most = values[first, channel]
                magnitudes[first, channel] = abs(least)
                for row in range(1, GROUP_ROWS):
                    value = values[first + row, channel]
                    magnitudes[first + row, channel] = abs(value)
                    least = value if value < least else least
                    most = value if value > most else most
                low[group, channel], high[group, channel] = least, most
        else:
            for channel in range(channels):
                low[group, channel] = high[group, channel] = values[first, channel]
            for row in range(first, tokens):
                for channel in range(channels):
                    value = values[row, channel]
                    magnitudes[row, channel] = abs(value)
                    low[group, channel] = min(low[group, channel], value)
                    high[group, channel] = max(high[group, channel], value)


@_compiled("void(f4[:,::1], f4[:,::1])")
def sums_of_rows(values: Floats, sums: Floats) -> None:
    """Write sums of each `SUM_ROWS` rows of values (K, C), of which the last may be fewer: (ceil(K / SUM_ROWS), C)."""
    tokens, channels = values.shape
    for place in range(sums.shape[0]):
        first = place * SUM_ROWS
        if first + SUM_ROWS <= tokens:
            for channel in range(channels):
                total = values[first, channel]
                for row in range(1, SUM_ROWS):
                    total += values[first + row, channel]
                sums[place, channel] = total
        else:
            for channel in range(channels):
                sums[place, channel] = _ZERO
            for row in range(first, tokens):
                for channel in range(channels):
                    sums[place, channel] += values[row, channel]


@_compiled("void(f4[:,::1], i8, f4[::1])")
def total_of_sums(sums: Floats, tokens: int, total: Floats) -> None:
    """Write the sum over all tokens in torch's order, (C,), from those of each `SUM_ROWS`, which are written over.

    torch adds 16 rows, one after another, then 16 such sums, then 16 of those, and what is left over of each at the end.
    """
    level = tokens // SUM_ROWS
    for channel in range(sums.shape[1]):
        total[channel] = sums[level, channel] if tokens % SUM_ROWS else _ZERO
    for height in range(3):
        above = level // SUM_ROWS if height < 2 else 0
        for group in range(above):  # its sum takes the place of a row that has been added
            first = group * SUM_ROWS
            for channel in range(sums.shape[1]):
                part = sums[first, channel]
                for row in range(1, SUM_ROWS):
                    part += sums[first + row, channel]
                sums[group, channel] = part
        first = above * SUM_ROWS
        if first < level:
            for row in range(first + 1, level):
                for channel in range(sums.shape[1]):
                    sums[first, channel] += sums[row, channel]
            for channel in range(sums.shape[1]):
                total[channel] += sums[first, channel]
        level = above


@_compiled("void(f4[:,::1], f4[:,::1], f4[::1], i8, f4, f4[::1])")
def typical_inverses(
    low: Floats, high: Floats, total: Floats, tokens: int, smallest_share: float, inverse: Floats
) -> None:
    """Write one over the typical magnitude of each channel, (C,), and 0 where that is 0.

    Args:
        low, high: minima and maxima of groups.
        total: sum of roots of magnitudes over all tokens.
        smallest_share: of the largest magnitude, below which none is typical.
    """
    for channel in range(low.shape[1]):
        inverse[channel] = _ZERO
    for group in range(low.shape[0]):
        for channel in range(low.shape[1]):
            inverse[channel] = max(inverse[channel], max(high[group, channel], -low[group, channel]))
    for channel in range(low.shape[1]):
        root = total[channel] / np.float32(tokens)
        typical = max(root * root, inverse[channel] * smallest_share)
        inverse[channel] = _ZERO if typical == 0 else _ONE / max(typical, _TINY)


@_compiled("void(f4[:,::1], f4[::1], f4[:,::1])")
def squares(values: Floats, inverse: Floats, out: Floats) -> None:
    """Write the square of values (K, C) times inverse (C,)."""
    for row in range(values.shape[0]):
        for channel in range(values.shape[1]):
            relative = values[row, channel] * inverse[channel]
            out[row, channel] = relative * relative


@_compiled("void(f4[:,::1], f4[::1], f4[::1])")
def norms_of_squares(values: Floats, inverse: Floats, out: Floats) -> None:
    """Write the norm of each token's `squares`, (K,), added up as torch does where `sums_as_torch`; C is a multiple of LANES."""
    sums = np.empty(LANES, np.float32)
    for row in range(values.shape[0]):
        _add_fourth_powers(values, inverse, row, sums)
        total = _ZERO
        for lane in range(LANES):
            total += sums[lane]
        out[row] = math.sqrt(total)


@_compiled("void(f4[:,::1], f4[::1], f4[:,::1], f4[:,::1], f4[:,::1])")
def ranges(values: Floats, scale: Floats, low: Floats, high: Floats, affine: Floats) -> None:
    """Write minimum and maximum of each channel of values over scales into affine (2, C).

    Args:
        values: (K, C). scale: (K,).
        low, high: of groups of values, which are looked at again where a token's scale is not 1.
    """
    tokens, channels = values.shape
    for group in range(low.shape[0]):
        first = group * GROUP_ROWS
        after = min(first + GROUP_ROWS, tokens)
        is_ordinary = True
        for row in range(first, after):
            is_ordinary = is_ordinary and scale[row] == 1
        if not is_ordinary:
            for channel in range(channels):
                low[group, channel] = values[first, channel] / scale[first]
                high[group, channel] = low[group, channel]
            for row in range(first + 1, after):
                for channel in range(channels):
                    value = values[row, channel] / scale[row]
                    low[group, channel] = min(low[group, channel], value)
                    high[group, channel] = max(high[group, channel], value)
        for channel in range(channels):
            affine[0, channel] = (
                low[group, channel] if group == 0 else min(affine[0, channel], low[group, channel])
            )
            affine[1, channel] = (
                high[group, channel] if group == 0 else max(affine[1, channel], high[group, channel])
            )


@_compiled("void(f4[:,::1], f4[::1], f4[::1], f4[::1], b1, i1[:,::1])")
def codes(
    values: Floats, scale: Floats, low: Floats, inverse: Floats, fuses: bool, out: npt.NDArray[np.int8]
) -> None:
    """Write int8 codes (K, C) of values over scale (K,), from low (C,), in steps of 1 / inverse (C,).

    fuses: whether a product and its sum are rounded once.
    """
    scaled = np.empty(values.shape[1], np.float32)
    for row in range(values.shape[0]):
        source = values[row]
        if scale[row] != 1:
            for channel in range(values.shape[1]):
                scaled[channel] = values[row, channel] / scale[row]
            source = scaled
        if fuses:
            for channel in range(values.shape[1]):
                code = _fused(source[channel] - low[channel], inverse[channel], _MINIMUM)
                out[row, channel] = np.int8(np.int32((code + _ROUNDING) - _ROUNDING))
        else:
            for channel in range(values.shape[1]):
                code = (source[channel] - low[channel]) * inverse[channel] + _MINIMUM
                out[row, channel] = np.int8(np.int32((code + _ROUNDING) - _ROUNDING))


@_compiled("i4(i4[:,::1], i4[::1])")
def largest_of_rows(bits: npt.NDArray[np.int32], out: npt.NDArray[np.int32]) -> np.int32:
    """Write the largest of each row of bits (R, P) into out (R,). Return the least of all, or 0.

    The bits of float32 numbers that are not negative are in the order of the numbers, and those of a NaN above them.
    """
    least = np.int32(0)
    for row in range(bits.shape[0]):
        most = bits[row, 0]
        for place in range(bits.shape[1]):
            most = max(most, bits[row, place])
            least = min(least, bits[row, place])
        out[row] = most
    return least


@_compiled("void(f4[:,::1], f4[::1], u1[:,::1])")
def map_codes(roots: Floats, gain: Floats, out: npt.NDArray[np.uint8]) -> None:
    """Write roots (R, P) times gain (R,), rounded to whole numbers, halves up."""
    for row in range(roots.shape[0]):
        for place in range(roots.shape[1]):
            out[row, place] = np.uint8(np.int32(roots[row, place] * gain[row] + _HALF))


def _torch_fuses() -> bool:
    # (1 + 2**-12)**2 has a bit that only a fused sum keeps.
    factor = torch.full((64,), 1 + 2.0**-12)
    return bool((torch.addcmul(torch.full((64,), -1.0), factor, factor) != 2.0**-11).all())


def _sums_as_torch() -> bool:
    values = torch.randn(64, 40 * LANES, generator=torch.Generator().manual_seed(0)).square_()
    out = np.empty(len(values), np.float32)
    norms_of_squares(values.numpy(), np.ones(values.shape[1], np.float32), out)
    return bool((torch.linalg.vector_norm(values.square(), dim=-1).numpy() == out).all())


torch_fuses = _torch_fuses()
sums_as_torch = _sums_as_torch()
