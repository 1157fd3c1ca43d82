"""Gradients of the temporal convolution's taps and of the position embedding, in one reading of gradient and codes.

B clips, T frames, N tokens of a frame, C channels. Names in capitals are known when a kernel is compiled.
Source: section 3.3 of arXiv 2208.03550.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evl_cache.heads.decoder.tensors import StoredTokens

# Values of a block, all frames of one token by some channels: 8 a thread, as many as one load of 16 bytes brings. With
# their four sums a thread has some 100 registers, so that five programs share a processor and wait in turn.
BLOCK_VALUES = 1024
# Tokens of a program, at most. 14x14 patches have two programs a clip and block of channels, whose partial sums are a
# thirtieth of what they read.
TOKENS_PER_PROGRAM = 128


def position_gradients(
    dy: Tensor, tokens: StoredTokens, *, taps: bool, shift: bool, differences: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of taps, (3, C), and of shift, (T, C), float32; None for one that is not asked for.

    Row 0 of taps is the sum of dy[t] x[t-1] for the decoded tokens x, row 1 of dy[t] x[t], row 2 of dy[t] x[t+1].
    Sums are float32 and added in one order, so the same inputs give the same bits.

    Args:
        dy: gradient of the tokens with position, floating (B, T, N, C), contiguous.
        tokens: of the same clips.
        taps: whether the gradient of taps is needed.
        shift: whether the gradient of shift is needed.
        differences: whether codes are differences to the frame before, modulo 256.
    """
    if not (taps or shift):
        return None, None
    clips, frames, count, width = dy.shape
    parts = triton.cdiv(count, TOKENS_PER_PROGRAM)
    blocks = position_blocks(frames, width)
    sums = dy.new_empty(clips, parts, 3 + frames, width, dtype=torch.float32)
    position_gradients_kernel[(triton.cdiv(width, blocks["BLOCK_CHANNELS"]), parts, clips)](
        dy,
        tokens.tokens,
        # Unused where there are none: any pointer.
        dy if tokens.affine is None else tokens.affine,
        dy if tokens.token_scale is None else tokens.token_scale,
        sums,
        count,
        triton.cdiv(count, parts),
        CHANNELS=width,
        FRAMES=frames,
        **blocks,
        AFFINE=tokens.affine is not None,
        TOKEN_SCALE=tokens.token_scale is not None,
        DIFFERENCES=differences,
        TAPS=taps,
    )
    found = (sums if taps else sums[:, :, 3:]).sum((0, 1))
    return found[:3] if taps else None, found[-frames:] if shift else None


def position_blocks(frames: int, width: int) -> dict[str, int]:
    """Return the sizes of blocks, by the names of the kernel's arguments."""
    block_frames = triton.next_power_of_2(frames)
    channels = min(max(32, BLOCK_VALUES // block_frames), triton.next_power_of_2(width))
    return {"BLOCK_FRAMES": block_frames, "BLOCK_CHANNELS": channels}


@triton.jit
def position_gradients_kernel(
    dy,
    tokens,
    affine,
    token_scale,
    sums,
    count,
    count_of_program,
    CHANNELS: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    AFFINE: tl.constexpr,
    TOKEN_SCALE: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    TAPS: tl.constexpr,
):
    """One clip's `count_of_program` tokens, all frames of one token at a time, and a block of channels.

    Written: `sums` (B, programs of a clip, 3 + T, C), the taps' rows first.
    """
    clip = tl.program_id(2).to(tl.int64)
    frames = tl.arange(0, BLOCK_FRAMES)
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_width = channels < CHANNELS
    inside = (frames < FRAMES)[:, None] & in_width[None, :]
    has_before = ((frames > 0) & (frames < FRAMES))[:, None] & in_width[None, :]
    has_after = (frames < FRAMES - 1)[:, None] & in_width[None, :]
    gain = tl.full((BLOCK_CHANNELS,), 1, tl.float32)
    offset = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    if AFFINE:
        gain = tl.load(affine + clip * 2 * CHANNELS + channels, mask=in_width, other=0)
        offset = tl.load(affine + (clip * 2 + 1) * CHANNELS + channels, mask=in_width, other=0)
    total = tl.zeros((BLOCK_FRAMES, BLOCK_CHANNELS), tl.float32)
    by_before = tl.zeros((BLOCK_FRAMES, BLOCK_CHANNELS), tl.float32)
    by_here = tl.zeros((BLOCK_FRAMES, BLOCK_CHANNELS), tl.float32)
    by_after = tl.zeros((BLOCK_FRAMES, BLOCK_CHANNELS), tl.float32)

    frame_step = count * CHANNELS
    first = tl.program_id(1) * count_of_program
    for token in range(first, tl.minimum(first + count_of_program, count)):
        rows = (clip * FRAMES + frames) * count + token
        places = rows[:, None] * CHANNELS + channels[None, :]
        here = tl.load(dy + places, mask=inside, other=0).to(tl.float32)
        total += here
        if TAPS:
            before = tl.load(dy + places - frame_step, mask=has_before, other=0).to(tl.float32)
            after = tl.load(dy + places + frame_step, mask=has_after, other=0).to(tl.float32)
            codes = tl.load(tokens + places, mask=inside, other=0)
            if DIFFERENCES:
                codes = ((tl.cumsum(codes.to(tl.int32), 0) + 128) & 255) - 128  # int8 again
            x = codes.to(tl.float32) * gain[None, :] + offset[None, :]
            if TOKEN_SCALE:
                x *= tl.load(token_scale + rows, mask=frames < FRAMES, other=0).to(tl.float32)[:, None]
            # A frame is what the gradient of the frame after it has before it.
            by_before += after * x
            by_here += here * x
            by_after += before * x

    sums += (clip * tl.num_programs(1) + tl.program_id(1)) * (3 + FRAMES) * CHANNELS
    if TAPS:
        tl.store(sums + channels, tl.sum(by_before, 0), mask=in_width)
        tl.store(sums + CHANNELS + channels, tl.sum(by_here, 0), mask=in_width)
        tl.store(sums + 2 * CHANNELS + channels, tl.sum(by_after, 0), mask=in_width)
    tl.store(sums + (3 + frames)[:, None] * CHANNELS + channels[None, :], total, mask=inside)
