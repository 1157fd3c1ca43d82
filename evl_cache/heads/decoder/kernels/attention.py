"""The attention of a clip's query over its tokens with position, which are normalised in passing.

B clips, T frames, N tokens of a frame, K = T N tokens of a clip, C channels, H heads, S splits of a clip's tokens.
Source: section 3.2 of arXiv 2208.03550; online softmax, arXiv 1805.02867.

A program goes through one split of a clip's tokens, all channels at once, so that every token is read from memory once
for its statistics, its logits and the weighted mean. Inside a block channels are cut into parts, one for each warp: it
multiplies its own part of the query, and adds up its own part of the mean, which stays in registers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# By arithmetic, for an H100; not measured. A block is 32 tokens of up to 8 parts of 128 channels, one for each warp: each
# of 256 threads holds 64 sums, 64 registers of tokens and 64 of the tokens after them, as many as there are. Tokens go
# from registers into 64 KB of shared memory, which the matrix units read. Of float32 a quarter as many have room, and
# without TF32, outside the matrix units, long products would need too many registers: parts are smaller.
PART, EXACT_PART = 128, 32
BLOCK_VALUES, BLOCK_VALUES_OF_FLOAT32 = 1 << 15, 1 << 13
TOKENS_AT_LEAST, TOKENS_AT_LEAST_OF_FLOAT32, TOKENS_AT_MOST = 16, 8, 32  # the first two are Triton's limits
# Matrix units multiply sixteen rows at a time. More heads are taken by other programs, which find the tokens in the L2
# cache.
HEADS = 16
# An H100 has 132 processors, which hold a program each: with eight times as many the last wave costs little. A split
# that is too short spends its time on reading the query and writing its sums.
PROGRAMS = 1024
TOKENS_OF_SPLIT_AT_LEAST = 128
MERGED_CHANNELS = 256


class Attended(NamedTuple):
    """The result, and what the backward pass needs.

    Attributes:
        mean: weighted mean of normalised tokens, float32 (B, H, C).
        row_mean: of each token over channels, float32 (B, K).
        scale: one over each token's deviation, float32 (B, K).
        logits: float32 (B, H, K).
        log_total: logarithm of the sum of all exponentials of logits, float32 (B, H).
    """

    mean: Tensor
    row_mean: Tensor
    scale: Tensor
    logits: Tensor
    log_total: Tensor


def attend(y: Tensor, query: Tensor, epsilon: float, *, tf32: bool = False) -> Attended:
    """Return the mean of normalised tokens, weighted by softmax(normalised tokens . query) over K, for every head.

    Args:
        y: tokens with position, (B, T, N, C), contiguous; bfloat16, float16 or float32, in which products are made.
        query: float32 (B, H, C), with mean zero over channels.
        epsilon: added to the variance.
        tf32: whether products of float32 may be rounded to TF32.
    """
    clips, frames, per_frame, width = y.shape
    count, heads = frames * per_frame, query.shape[1]
    part, parts, tokens = _block_shape(width, y.dtype, exact=y.dtype == torch.float32 and not tf32)
    groups, splits = triton.cdiv(heads, HEADS), split_count(clips, count)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=y.device)

    result = Attended(
        mean=empty(clips, heads, width),
        row_mean=empty(clips, count),
        scale=empty(clips, count),
        logits=empty(clips, heads, count),
        log_total=empty(clips, heads),
    )
    sums, tops, totals = (
        empty(clips, splits, heads, width),
        empty(clips, splits, heads),
        empty(clips, splits, heads),
    )
    length = triton.cdiv(triton.cdiv(count, splits), tokens) * tokens
    _attend_split[(clips * splits * groups,)](
        y, query.contiguous(), result.row_mean, result.scale, result.logits, sums, tops, totals,
        epsilon, count, splits, length,
        H=heads, C=width, HEADS=HEADS, PARTS=parts, PART=part, TOKENS=tokens,
        PRECISION="tf32" if tf32 else "ieee", num_warps=min(16, max(4, parts * part // 128)), num_stages=1,
    )  # fmt: skip
    blocks = triton.cdiv(width, MERGED_CHANNELS)
    _merge[(clips * heads * blocks,)](
        result.mean, result.log_total, sums, tops, totals, splits,
        H=heads, C=width, SPLITS=triton.next_power_of_2(splits), CHANNELS=MERGED_CHANNELS, num_warps=2,
    )  # fmt: skip
    return result


def _block_shape(width: int, dtype: torch.dtype, *, exact: bool) -> tuple[int, int, int]:
    """Return channels of a part, the number of parts, and the number of tokens of a block, powers of two."""
    part = min(EXACT_PART if exact else PART, max(16, triton.next_power_of_2(width)))
    parts = triton.next_power_of_2(triton.cdiv(width, part))
    narrow = dtype != torch.float32
    values = BLOCK_VALUES if narrow else BLOCK_VALUES_OF_FLOAT32
    at_least = TOKENS_AT_LEAST if narrow else TOKENS_AT_LEAST_OF_FLOAT32
    return part, parts, min(TOKENS_AT_MOST, max(at_least, values // (parts * part)))


def split_count(clips: int, count: int) -> int:
    """Return into how many splits the `count` tokens of each clip are cut."""
    wanted: int = triton.cdiv(PROGRAMS, clips)
    return max(1, min(wanted, count // TOKENS_OF_SPLIT_AT_LEAST))


@triton.jit
def _attend_split(
    y,
    query,
    row_mean,
    scale,
    logits,
    sums,
    tops,
    totals,
    epsilon,
    count,
    splits,
    length,
    H: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a split's row means, scales and logits, and its weighted sum, largest weight and total for every head.

    What is added up is exp(logit) scale (token - its mean). The exponentials are taken relative to the largest
    exp(logit) scale so far, so that no weight passes 1, and the largest is 1: float16 could not hold others.
    """
    GROUPS: tl.constexpr = (H + HEADS - 1) // HEADS
    group = tl.program_id(0) % GROUPS
    split = tl.program_id(0) // GROUPS % splits
    clip = (tl.program_id(0) // (GROUPS * splits)).to(tl.int64)
    part = tl.arange(0, PARTS)[:, None, None]
    channel = part * PART + tl.arange(0, PART)[None, None, :]  # (PARTS,1,PART)
    in_width = channel < C
    widths = tl.minimum(tl.maximum(C - tl.arange(0, PARTS) * PART, 0), PART).to(tl.float32)[
        :, None
    ]  # (PARTS,1)
    head = group * HEADS + tl.arange(0, HEADS)
    is_head = head < H

    q_places = query + clip * H * C + head[None, :, None] * C + channel
    q = tl.load(q_places, mask=is_head[None, :, None] & in_width, other=0).to(
        y.dtype.element_ty
    )  # (PARTS,HEADS,PART)
    # Rounding leaves the query a small mean, which would let the tokens' means into their logits.
    q_total = tl.sum(tl.sum(q.to(tl.float32), 2), 0)  # (HEADS,)

    total = tl.zeros((PARTS, HEADS, PART), tl.float32)
    offset = tl.zeros((HEADS,), tl.float32)
    weight_total = tl.zeros((HEADS,), tl.float32)
    top = tl.full((HEADS,), -float("inf"), tl.float32)
    start = split * length
    stop = tl.minimum(start + length, count)
    following = _block(y, clip, start, stop, count, channel, C, TOKENS)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        is_token = token < stop
        # Asked for one block ahead, while this one is worked on.
        block, following = following, _block(y, clip, first + TOKENS, stop, count, channel, C, TOKENS)

        means, scales = _statistics(block, in_width, widths, epsilon, C)
        tl.store(row_mean + clip * count + token, means, mask=is_token & (group == 0))
        tl.store(scale + clip * count + token, scales, mask=is_token & (group == 0))

        products = tl.sum(
            tl.dot(q, tl.permute(block, (0, 2, 1)), input_precision=PRECISION), 0
        )  # (HEADS,TOKENS)
        found = (products - q_total[:, None] * means[None, :]) * scales[None, :]
        logit_places = logits + clip * H * count + head[:, None] * count + token[None, :]
        tl.store(logit_places, found, mask=is_head[:, None] & is_token[None, :])

        log_weight = tl.where(is_token[None, :], found + tl.log(scales)[None, :], -float("inf"))
        new_top = tl.maximum(top, tl.max(log_weight, 1))
        decay = tl.exp(top - new_top)
        weights = tl.exp(log_weight - new_top[:, None]).to(y.dtype.element_ty)  # (HEADS,TOKENS)
        exponentials = tl.where(is_token[None, :], tl.exp(found - new_top[:, None]), 0.0)
        weight_total = weight_total * decay + tl.sum(exponentials, 1)
        offset = offset * decay + tl.sum(weights.to(tl.float32) * means[None, :], 1)
        by_part = tl.broadcast_to(weights[None], (PARTS, HEADS, TOKENS))
        total = tl.dot(by_part, block, total * decay[None, :, None], input_precision=PRECISION)
        top = new_top

    row = (clip * splits + split) * H + head
    sum_places = sums + row[None, :, None] * C + channel
    tl.store(sum_places, total - offset[None, :, None], mask=is_head[None, :, None] & in_width)
    tl.store(tops + row, top, mask=is_head)
    tl.store(totals + row, weight_total, mask=is_head)


@triton.jit
def _block(y, clip, first, stop, count, channel, C: tl.constexpr, TOKENS: tl.constexpr):
    """Return a block of a clip's tokens, (PARTS, TOKENS, PART), zero from token `stop` on."""
    token = first + tl.arange(0, TOKENS)
    places = y + (clip * count + token)[None, :, None] * C + channel
    return tl.load(places, mask=(token < stop)[None, :, None] & (channel < C), other=0)


@triton.jit
def _statistics(block, in_width, widths, epsilon, C: tl.constexpr):
    """Return each token's mean over channels and one over its deviation, (TOKENS,) each, of a (PARTS, TOKENS, PART) block.

    Each part has its own mean, from which its squares are taken, so that nothing cancels; then parts are put together.
    """
    values = block.to(tl.float32)
    part_sums = tl.sum(values, 2)  # (PARTS,TOKENS)
    means = tl.sum(part_sums, 0) / C
    part_means = part_sums / tl.maximum(widths, 1.0)
    centred = tl.where(in_width, values - part_means[:, :, None], 0.0)
    apart = part_means - means[None, :]
    squares = tl.sum(tl.sum(centred * centred, 2) + widths * apart * apart, 0)
    return means, tl.rsqrt(squares / C + epsilon)


@triton.jit
def _merge(
    mean,
    log_total,
    sums,
    tops,
    totals,
    splits,
    H: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write one head's mean of one clip, some channels of it, from the sums of all splits."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)  # of (B, H)
    channel = program % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.arange(0, SPLITS)
    rows = (row // H * splits + split) * H + row % H  # of (B, S, H)
    top = tl.load(tops + rows, mask=split < splits, other=-float("inf"))
    largest = tl.max(top, 0)
    factor = tl.exp(top - largest)
    total = tl.sum(factor * tl.load(totals + rows, mask=split < splits, other=0), 0)
    mask = (split < splits)[:, None] & (channel < C)[None, :]
    parts = tl.load(sums + rows[:, None] * C + channel[None, :], mask=mask, other=0)
    tl.store(mean + row * C + channel, tl.sum(parts * factor[:, None], 0) / total, mask=channel < C)
    tl.store(log_total + row, largest + tl.log(total))
