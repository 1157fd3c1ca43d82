"""Tokens with position: the stored tokens, the temporal convolution, the position embedding, and motion, in one kernel.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, R rows of a motion table.
Source: section 3.3 of arXiv 2208.03550.

A program makes one token's rows of some clips and frames, and some channels of them. Motion of one patch is the product
of its rows of the maps, which differ between clips and frames, and of the table's rows that this patch reads, which are
the same for all: so many rows share one reading of the table. Both directions are added to the same sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evl_cache.heads.decoder.kernels.codes import map_roots, map_rows, map_values, stored_codes, table_rows
from evl_cache.heads.decoder.tensors import SharedTensors, StoredMaps, StoredTokens

# By arithmetic, for an H100; not measured. The table stays in the L2 cache, from which every program reads
# 2 P x CHANNELS values: with 128 rows a layer of 256 clips reads 1.9 GB of it, and with 64 rows twice that, more time
# than the products take. Maps are read and decoded once for every block of channels. Sums of 128 x 128 are 64
# registers of each of 256 threads.
ROWS = 128
CHANNELS = 128
# Keys of one product. P = 196 is padded to 224, with 64 keys it would be 256.
KEYS = 32
STAGES = 3
WARPS = 8
# Two programs at a time on a processor: one reads its tokens while the other multiplies.
REGISTERS = 128
# float32 products without TF32 run outside the tensor cores: smaller blocks, or registers do not suffice.
EXACT_ROWS, EXACT_CHANNELS, EXACT_STAGES = 64, 64, 2


def positioned(
    tokens: StoredTokens,
    maps: StoredMaps | None,
    shared: SharedTensors,
    grid: tuple[int, int],
    dtype: torch.dtype,
    *,
    differences: bool = False,
    tf32: bool = False,
) -> Tensor:
    """Return tokens with position, (B, T, N, C): summed in float32 and rounded once to `dtype`.

    Args:
        tokens: of B clips.
        maps: of B clips; None adds no motion, as does a single frame.
        shared: what the temporal modules add to tokens.
        grid: patches (Hp, Wp).
        dtype: of the result and of the products: bfloat16, float16 or float32.
        differences: whether 8-bit codes of tokens and maps are stored as `frame_difference` returns them.
        tf32: whether products of float32 may be rounded to TF32.
    """
    values = tokens.tokens
    clips, frames, per_frame, width = values.shape
    moves = maps is not None and frames > 1 and shared.table_prev is not None
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    exact = dtype == torch.float32 and not tf32
    rows, channels = (EXACT_ROWS, EXACT_CHANNELS) if exact else (ROWS, CHANNELS)
    channels = min(channels, max(16, triton.next_power_of_2(width)))
    blocks = triton.cdiv(clips * frames, rows) * per_frame * triton.cdiv(width, channels)
    tables = (shared.table_prev, shared.table_next) if moves else (None, None)
    _positioned[(blocks,)](
        result,
        *map(_dense, (values, tokens.affine, tokens.token_scale, shared.taps, shared.shift)),
        *map(_dense, (maps.maps, maps.row_max) if moves and maps is not None else (None, None)),
        *(None if table is None else _dense(table.to(dtype)) for table in tables),
        clips, FRAMES=frames, HEIGHT=grid[0], WIDTH=grid[1], C=width,
        DIFFERENCES=differences, PRECISION="tf32" if tf32 else "ieee", ROWS=rows, CHANNELS=channels, KEYS=KEYS,
        num_warps=WARPS, num_stages=EXACT_STAGES if exact else STAGES, maxnreg=REGISTERS,
    )  # fmt: skip
    return result


def _dense(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor whose places in memory follow from its shape, the same one if it is so already."""
    return None if tensor is None else tensor.contiguous()


@triton.jit(do_not_specialize=["clips"])
def _positioned(
    result,
    tokens,
    affine,
    token_scale,
    taps,
    shift,
    maps,
    row_max,
    table_prev,
    table_next,
    clips,
    FRAMES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write one block of tokens with position. Blocks of channels come first, then tokens, then clips."""
    PATCHES: tl.constexpr = HEIGHT * WIDTH
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    token = program // BLOCKS % (1 + PATCHES)
    row = program // (BLOCKS * (1 + PATCHES)) * ROWS + tl.arange(0, ROWS)
    channel = program % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    clip, frame = row // FRAMES, row % FRAMES
    exists = clip < clips

    # In halves, which are joined: with all channels at once registers would not suffice for two programs at a time.
    HALF: tl.constexpr = CHANNELS // 2
    low = program % BLOCKS * CHANNELS + tl.arange(0, HALF)
    left = _shifted_tokens(
        tokens, affine, token_scale, taps, shift, clip, frame, token, low, exists,
        FRAMES, PATCHES, C, DIFFERENCES,
    )  # fmt: skip
    right = _shifted_tokens(
        tokens, affine, token_scale, taps, shift, clip, frame, token, low + HALF, exists,
        FRAMES, PATCHES, C, DIFFERENCES,
    )  # fmt: skip
    sums = tl.join(left, right).permute(0, 2, 1).reshape(ROWS, CHANNELS)
    if maps is not None:
        # The class token, token 0, has no motion: it goes through no keys.
        patch, last_key = tl.maximum(token - 1, 0), tl.where(token > 0, PATCHES, 0)
        for direction in tl.static_range(2):
            step = frame - 1 + direction
            valid = exists & (step >= 0) & (step < FRAMES - 1)
            table = table_prev if direction == 0 else table_next
            sums = _add_motion(
                sums, maps, row_max, table, clip, direction, step, patch, channel, valid, last_key,
                FRAMES, HEIGHT, WIDTH, C, DIFFERENCES, PRECISION, KEYS,
            )  # fmt: skip

    places = ((clip.to(tl.int64) * FRAMES + frame) * (1 + PATCHES) + token) * C
    mask = exists[:, None] & (channel < C)[None, :]
    tl.store(result + places[:, None] + channel[None, :], sums.to(result.dtype.element_ty), mask=mask)


@triton.jit
def _shifted_tokens(
    tokens,
    affine,
    token_scale,
    taps,
    shift,
    clip,
    frame,
    token,
    channel,
    exists,
    FRAMES: tl.constexpr,
    PATCHES: tl.constexpr,
    C: tl.constexpr,
    DIFFERENCES: tl.constexpr,
):
    """Return decoded tokens plus their convolution over frames plus the shift, float32 (rows, channels).

    A value is (code * gain + offset) * scale. All frames of a clip share gains and offsets, so codes and scales are
    convolved first, and each gain and each offset is read and used once.
    """
    in_width = (channel < C)[None, :]
    place = (clip.to(tl.int64) * FRAMES + frame) * (1 + PATCHES) + token
    there = exists[:, None] & in_width
    places = tokens + place[:, None] * C + channel[None, :]
    stride: tl.constexpr = (1 + PATCHES) * C
    differences: tl.constexpr = DIFFERENCES and affine is not None
    convolves: tl.constexpr = taps is not None and FRAMES > 1
    has_previous, has_next = exists & (frame > 0), exists & (frame < FRAMES - 1)
    if convolves:
        previous = stored_codes(
            places - stride,
            has_previous[:, None] & in_width,
            frame[:, None] - 1,
            stride,
            FRAMES - 1,
            differences,
        )
        following = tl.load(places + stride, mask=has_next[:, None] & in_width, other=0)
        if differences:
            codes = previous + tl.load(places, mask=there, other=0)
            following += codes
        else:
            codes = tl.load(places, mask=there, other=0)
    else:
        codes = stored_codes(places, there, frame[:, None], stride, FRAMES, differences)

    weight = _token_scale(token_scale, place, exists)
    if taps is not None:
        weight *= 1 + _tap(taps, 1, channel, C)
    sums = codes.to(tl.float32) * weight
    if convolves:
        before = _token_scale(token_scale, place - (1 + PATCHES), has_previous) * _tap(taps, 0, channel, C)
        after = _token_scale(token_scale, place + (1 + PATCHES), has_next) * _tap(taps, 2, channel, C)
        sums += previous.to(tl.float32) * before
        sums += following.to(tl.float32) * after
        weight += before + after
    if affine is not None:
        places = affine + clip.to(tl.int64)[:, None] * (2 * C) + channel[None, :]
        sums *= tl.load(places, mask=there, other=0).to(tl.float32)
        sums += tl.load(places + C, mask=there, other=0).to(tl.float32) * weight
    if shift is not None:
        places = shift + frame[:, None] * C + channel[None, :]
        sums += tl.load(places, mask=in_width, other=0).to(tl.float32)
    return sums


@triton.jit
def _token_scale(token_scale, place, there):
    """Return the scale of each row's token, float32 (rows, 1), 1 where tokens have none; 0 for rows not `there`."""
    if token_scale is None:
        scales = there.to(tl.float32)
    else:
        scales = tl.load(token_scale + place, mask=there, other=0).to(tl.float32)
    return scales[:, None]


@triton.jit
def _tap(taps, which: tl.constexpr, channel, C: tl.constexpr):
    """Return one of the three taps for some channels, float32 (1, channels)."""
    return tl.load(taps + which * C + channel, mask=channel < C, other=0).to(tl.float32)[None, :]


@triton.jit
def _add_motion(
    sums,
    maps,
    row_max,
    table,
    clip,
    direction,
    step,
    patch,
    channel,
    valid,
    last_key,
    FRAMES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return `sums` (rows, channels) plus the motion of one patch in one direction; rows not `valid` get none."""
    PATCHES: tl.constexpr = HEIGHT * WIDTH
    coded: tl.constexpr = row_max is not None
    row = map_rows(clip, direction, step, patch, FRAMES - 1, PATCHES)
    if row_max is not None:
        roots = map_roots(row_max, row, valid)[:, None]
    places = maps + row[:, None] * PATCHES
    for first_key in range(0, last_key, KEYS):
        key = first_key + tl.arange(0, KEYS)
        mask = valid[:, None] & (key < PATCHES)[None, :]
        found = stored_codes(
            places + key[None, :], mask, step[:, None], PATCHES * PATCHES, FRAMES - 1, DIFFERENCES and coded
        )
        if row_max is not None:
            weights = map_values(found, roots, table.dtype.element_ty)
        else:
            weights = found.to(table.dtype.element_ty)
        window = table + table_rows(patch, key, HEIGHT, WIDTH)[:, None] * C + channel[None, :]
        window_mask = (key < PATCHES)[:, None] & (channel < C)[None, :]
        vectors = tl.load(window, mask=window_mask, other=0)
        sums = tl.dot(weights, vectors, sums, input_precision=PRECISION)
    return sums
