"""Gradients of the motion tables: maps^T gradient for each query patch, added up by the offset of query and key.

B clips, T frames, P patches (grid HEIGHT x WIDTH), N = 1+P tokens of a frame, C channels, R rows of a motion table,
Q query patches worked on together. Names in capitals are known when a kernel is compiled.
Source: section 3.3 of arXiv 2208.03550.

Pairs of patches with one offset share a row of a table, so rows are sums over pairs. Adding to them from every pair
needs atomics, whose order changes from run to run. Here the first kernel writes what each pair has, (Q, P, C) a
direction, and the second adds up the pairs of each row in order. At 14x14 patches and 768 channels that is 236 MB,
written and read once: little beside the gradient, which is as large as the tokens at 256 clips.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evl_cache.heads.decoder.kernels.codes import map_rows, map_values
from evl_cache.heads.decoder.tensors import StoredMaps

# Clips of a step, the products' inner dimension, at most, and keys and channels of a program, by bytes of a value.
# 128 x 128 sums are 64 registers of a thread. With 128 registers and 80 KiB two programs share a processor, and one
# decodes maps while the other multiplies. Products of 32 bits take no tensor cores, unless TF32 is allowed.
BLOCK_CLIPS = {2: 64, 4: 16}
BLOCK_SIDE = {2: 128, 4: 64}
WARPS, REGISTERS = 8, 128
# A row's channels are added up by so many at a time.
BLOCK_SUM = 128


def table_gradients(
    maps: StoredMaps,
    dy: Tensor,
    grid: tuple[int, int],
    *,
    tf32: bool = False,
    differences: bool = False,
    pairs_bytes: int = 256 << 20,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the flipped motion tables prev and next, float32 (R, C) each.

    Sums are float32 and added in one order, so the same inputs give the same bits. Products are of values in dy's dtype.

    Args:
        maps: of the clips, with T-1 > 0 frames.
        dy: gradient of the tokens with position, floating (B, T, N, C), contiguous.
        grid: (HEIGHT, WIDTH).
        tf32: whether products of float32 values may be rounded to TF32.
        differences: whether codes are differences to the frame before, modulo 256.
        pairs_bytes: most memory for pairs; a larger grid is worked on in groups of query rows.
    """
    clips, frames, _, width = dy.shape
    height, columns = grid
    patches = height * columns
    rows = (2 * height - 1) * (2 * columns - 1)
    group = max(1, min(height, pairs_bytes // (2 * columns * patches * width * 4)))  # query rows
    pairs = dy.new_empty(2, group * columns, patches, width, dtype=torch.float32)
    tables = dy.new_empty(2, rows, width, dtype=torch.float32)
    blocks, limits = table_blocks(clips, patches, width, dy.dtype), table_limits(dy)
    tiles = triton.cdiv(patches, blocks["BLOCK_KEYS"]) * triton.cdiv(width, blocks["BLOCK_CHANNELS"])
    for first in range(0, height, group):
        last = min(first + group, height)
        pair_sums_kernel[(2 * tiles, (last - first) * columns)](
            maps.maps,
            maps.maps if maps.row_max is None else maps.row_max,
            dy,
            pairs,
            clips,
            first * columns,
            FRAMES=frames,
            PATCHES=patches,
            CHANNELS=width,
            GROUP=group * columns,
            **blocks,
            CODES=maps.row_max is not None,
            DIFFERENCES=differences,
            PRECISION="tf32" if tf32 else "ieee",
            **limits,
        )
        row_sums_kernel[(triton.cdiv(width, BLOCK_SUM), 2 * rows)](
            pairs,
            tables,
            first,
            last,
            HEIGHT=height,
            WIDTH=columns,
            CHANNELS=width,
            GROUP=group * columns,
            BLOCK_COLUMNS=triton.next_power_of_2(columns),
            BLOCK_CHANNELS=BLOCK_SUM,
        )
    return tables[0], tables[1]


def table_blocks(clips: int, patches: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the sizes of blocks, by the names of the first kernel's arguments."""
    side = BLOCK_SIDE[dtype.itemsize]
    return {
        "BLOCK_CLIPS": max(16, min(BLOCK_CLIPS[dtype.itemsize], triton.next_power_of_2(clips))),
        "BLOCK_KEYS": max(16, min(side, triton.next_power_of_2(patches))),
        "BLOCK_CHANNELS": max(16, min(side, triton.next_power_of_2(width))),
    }


def table_limits(dy: Tensor) -> dict[str, int]:
    """Return the first kernel's warps, and registers of a thread where there must be a limit, by Triton's names."""
    # Matrix instructions before Hopper's read from registers, and need more.
    hopper = dy.is_cuda and torch.cuda.get_device_capability(dy.device) >= (9, 0)
    return {"num_warps": WARPS, "maxnreg": REGISTERS} if hopper else {"num_warps": WARPS}


# Compiled once for all sizes of a batch: a last one of another size would wait for the compiler.
@triton.jit(do_not_specialize=["clips_in_all", "first_query"])
def pair_sums_kernel(
    maps,
    row_max,
    dy,
    pairs,
    clips_in_all,
    first_query,
    FRAMES: tl.constexpr,
    PATCHES: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_CLIPS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CODES: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query patch with some keys, one direction and a block of channels, over all clips and frames.

    Programs of one query run side by side, so that maps and gradient come out of the cache for all but the first.
    Frames of a clip come one after the other, so that differences are undone by adding up.

    Written: `pairs` (2, GROUP, P, C).
    """
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    STEPS: tl.constexpr = FRAMES - 1
    tile, place = tl.program_id(0), tl.program_id(1)
    direction = tile % 2  # 0 is prev, whose map of step t belongs to frame t+1; 1 is next, to frame t
    channels = tile // 2 % CHANNEL_BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    keys = tile // 2 // CHANNEL_BLOCKS * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    query = first_query + place
    in_width, in_grid = channels < CHANNELS, keys < PATCHES

    # Places in a block of clips stay the same; a step moves the pointers to it.
    clips = tl.arange(0, BLOCK_CLIPS)
    map_places = clips.to(tl.int64)[:, None] * (2 * STEPS * PATCHES * PATCHES) + keys[None, :]
    top_places = clips.to(tl.int64) * (2 * STEPS * PATCHES)
    back_places = clips.to(tl.int64)[:, None] * (FRAMES * (1 + PATCHES) * CHANNELS) + channels[None, :]

    total = tl.zeros((BLOCK_CHANNELS, BLOCK_KEYS), tl.float32)
    running = tl.zeros((BLOCK_CLIPS, BLOCK_KEYS), tl.int32)
    row = map_rows(tl.cast(0, tl.int64), direction, 0, query, STEPS, PATCHES)
    if CODES:
        top = tl.load(row_max + row + top_places, mask=clips < clips_in_all, other=0)
    for step in tl.range(0, tl.cdiv(clips_in_all, BLOCK_CLIPS) * STEPS):
        first, frame = step // STEPS * BLOCK_CLIPS, step % STEPS
        there = clips < clips_in_all - first
        codes = tl.load(maps + row * PATCHES + map_places, mask=there[:, None] & in_grid[None, :], other=0)
        token = (tl.cast(first, tl.int64) * FRAMES + frame + 1 - direction) * (1 + PATCHES) + 1 + query
        back = tl.load(dy + token * CHANNELS + back_places, mask=there[:, None] & in_width[None, :], other=0)
        first = (step + 1) // STEPS * BLOCK_CLIPS
        row = map_rows(tl.cast(first, tl.int64), direction, (step + 1) % STEPS, query, STEPS, PATCHES)
        if CODES:
            if DIFFERENCES:
                running = (running & tl.where(frame == 0, 0, 255)) + codes.to(tl.int32)
                codes = running & 255
            roots = tl.sqrt(top.to(tl.float32)) * (1 / 255)
            values = map_values(codes, roots[:, None], dy.dtype.element_ty)
            # Of the next step: so small a load is not moved ahead by the compiler.
            top = tl.load(row_max + row + top_places, mask=clips < clips_in_all - first, other=0)
        else:
            values = codes.to(dy.dtype.element_ty)
        total = tl.dot(tl.trans(back), values, total, input_precision=PRECISION)
    total = tl.trans(total)
    pair = (direction * GROUP + place).to(tl.int64) * PATCHES + keys
    places = pair[:, None] * CHANNELS + channels[None, :]
    tl.store(pairs + places, total, mask=in_grid[:, None] & in_width[None, :])


@triton.jit(do_not_specialize=["first", "last"])
def row_sums_kernel(
    pairs,
    tables,
    first,
    last,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One row of one table and a block of channels: the sum of all pairs with its offset, by query rows in order.

    Queries are those of grid rows `first` to `last`; all but the first group's are added to `tables` (2, R, C).
    """
    ROWS: tl.constexpr = (2 * HEIGHT - 1) * (2 * WIDTH - 1)
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_width = channels < CHANNELS
    direction, row = tl.program_id(1) // ROWS, tl.program_id(1) % ROWS
    # Of a flipped table: how far the key lies below the query, and right of it.
    down = row // (2 * WIDTH - 1) - (HEIGHT - 1)
    right = row % (2 * WIDTH - 1) - (WIDTH - 1)
    columns = tl.arange(0, BLOCK_COLUMNS)
    inside = (columns < WIDTH) & (columns + right >= 0) & (columns + right < WIDTH)

    places = tl.program_id(1) * CHANNELS + channels
    total = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    if first > 0:
        total += tl.load(tables + places, mask=in_width, other=0)
    for query_row in range(tl.maximum(first, -down), tl.minimum(last, HEIGHT - down)):
        queries = (query_row - first) * WIDTH + columns
        keys = (query_row + down) * WIDTH + columns + right
        pair = (direction * GROUP + queries).to(tl.int64) * (HEIGHT * WIDTH) + keys
        found = tl.load(
            pairs + pair[:, None] * CHANNELS + channels[None, :],
            mask=inside[:, None] & in_width[None, :],
            other=0,
        )
        total += tl.sum(found, 0)
    tl.store(tables + places, total, mask=in_width)
