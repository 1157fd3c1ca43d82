"""What several kernels read: stored tokens and maps, decoded in registers, and the rows of a motion table.

B clips, T frames, P patches (grid HEIGHT x WIDTH), N = 1+P tokens of a frame, C channels.

Offsets are int64 wherever a product of B is in them. Names in capitals are known when a kernel is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def table_rows(query, keys, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return the rows of a flipped motion table, (2 HEIGHT - 1)(2 WIDTH - 1) rows, of one query patch and some keys."""
    down = HEIGHT - 1 - query // WIDTH + keys // WIDTH
    right = WIDTH - 1 - query % WIDTH + keys % WIDTH
    return down * (2 * WIDTH - 1) + right


@triton.jit
def stored_codes(places, mask, frame, stride, FRAMES: tl.constexpr, DIFFERENCES: tl.constexpr):
    """Return stored values at pointers `places`, 0 outside the `mask`; differences to the frame before are undone.

    Undoing sums all frames up to this one in 8 bits, so modulo 256. The frames before it are read again, out of the
    innermost cache: a scan over rows would pass values between threads, and needs whole clips in a block.

    Args:
        places: of values, one row a frame.
        mask: of the shape of `places`.
        frame: of each row, 0 to FRAMES - 1, so shaped that it broadcasts.
        stride: between a frame and the next.
    """
    codes = tl.load(places, mask=mask, other=0)
    if DIFFERENCES:
        for back in tl.static_range(1, FRAMES):
            codes += tl.load(places - back * stride, mask=mask & (frame >= back), other=0)
    return codes


@triton.jit
def map_rows(clip, direction, step, patch, STEPS: tl.constexpr, PATCHES: tl.constexpr):
    """Return int64 places of rows among those of maps (B, 2, STEPS, P); `direction` is 0 for prev, 1 for next."""
    return ((clip.to(tl.int64) * 2 + direction) * STEPS + step) * PATCHES + patch


@triton.jit
def map_roots(row_max, rows, mask):
    """Return what turns codes of some rows of maps into square roots of values, float32; 0 outside the mask."""
    top = tl.load(row_max + rows, mask=mask, other=0).to(tl.float32)
    return tl.div_rn(tl.sqrt_rn(top), 255.0)


@triton.jit
def map_values(codes, roots, DTYPE: tl.constexpr):
    """Return values of map codes, computed in float32 and rounded once to DTYPE; `roots` broadcasts."""
    root = codes.to(tl.float32) * roots
    return (root * root).to(DTYPE)
