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

# By arithmetic and by what compilers make of it (Triton 3.6 and 3.8, sm_80 and sm_90); not measured. A block is 16 tokens
# of up to 8 parts of 128 channels: each of 256 threads holds 64 sums, 32 registers of tokens and 32 of the tokens after
# them. With twice as many tokens Triton 3.6 spills. Tokens go from registers into 32 KB of shared memory, from where the
# matrix units take them. Of float32, a thread has half as many sums, and a part fewer channels: outside the matrix units,
# without TF32, long products would need too many registers.
TOKENS = 16
PART, TF32_PART, EXACT_PART = 128, 64, 32
SUMS_OF_THREAD, SUMS_OF_THREAD_OF_FLOAT32 = 64, 32
# Query and tokens of a block must fit in the 163 KB of shared memory that a program may have on an A100.
BYTES_OF_TOKEN_AT_MOST = 4096
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
    assert y.is_contiguous() and can_attend(y.shape[-1], y.dtype)
    clips, frames, per_frame, width = y.shape
    count, heads = frames * per_frame, query.shape[1]
    part = _part(width, y.dtype, tf32=tf32)
    parts = triton.next_power_of_2(triton.cdiv(width, part))
    sums_of_thread = SUMS_OF_THREAD_OF_FLOAT32 if y.dtype == torch.float32 else SUMS_OF_THREAD
    warps = min(16, max(4, parts * part * HEADS // (32 * sums_of_thread)))
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
    sums = empty(clips, splits, heads, width)
    tops, totals = empty(clips, splits, heads), empty(clips, splits, heads)
    length = triton.cdiv(triton.cdiv(count, splits), TOKENS) * TOKENS  # tokens of a split
    _attend_split[(clips * splits * groups,)](
        y, query.contiguous(), result.row_mean, result.scale, result.logits, sums, tops, totals,
        epsilon, count, splits, length,
        H=heads, C=width, HEADS=HEADS, PARTS=parts, PART=part, TOKENS=TOKENS,
        PRECISION="tf32" if tf32 else "ieee", num_warps=warps, num_stages=1,
    )  # fmt: skip
    blocks = triton.cdiv(width, MERGED_CHANNELS)
    _merge[(clips * heads * blocks,)](
        result.mean, result.log_total, sums, tops, totals, splits,
        H=heads, C=width, SPLITS=triton.next_power_of_2(splits), CHANNELS=MERGED_CHANNELS, num_warps=2,
    )  # fmt: skip
    return result


def can_attend(width: int, dtype: torch.dtype) -> bool:
    """Whether tokens of so many channels have room in shared memory: 2048 of half precision, 1024 of float32."""
    padded: int = triton.next_power_of_2(width)
    return padded * dtype.itemsize <= BYTES_OF_TOKEN_AT_MOST


def _part(width: int, dtype: torch.dtype, *, tf32: bool) -> int:
    """Return the channels of a part, a power of two."""
    most = PART if dtype != torch.float32 else TF32_PART if tf32 else EXACT_PART
    enough: int = triton.next_power_of_2(width)
    return min(most, max(16, enough))


def split_count(clips: int, count: int) -> int:
    """Return into how many splits the `count` tokens of each clip are cut."""
    wanted: int = triton.cdiv(PROGRAMS, max(1, clips))
    return max(1, min(wanted, count // TOKENS_OF_SPLIT_AT_LEAST))


@triton.jit(do_not_specialize=["count", "splits", "length"])
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
    head = group * HEADS + tl.arange(0, HEADS)
    is_head = head < H

    q_places = query + clip * H * C + head[None, :, None] * C + channel
    q = tl.load(q_places, mask=is_head[None, :, None] & in_width, other=0)  # (PARTS,HEADS,PART)
    q = q.to(y.dtype.element_ty)
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

        means, scales = _statistics(block, in_width, epsilon, C)
        tl.store(row_mean + clip * count + token, means, mask=is_token & (group == 0))
        tl.store(scale + clip * count + token, scales, mask=is_token & (group == 0))

        by_part = tl.dot(q, tl.permute(block, (0, 2, 1)), input_precision=PRECISION)  # (PARTS,HEADS,TOKENS)
        products = tl.sum(by_part, 0)
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
        same = tl.broadcast_to(weights[None], (PARTS, HEADS, TOKENS))
        total = tl.dot(same, block, total * decay[None, :, None], input_precision=PRECISION)
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
def _statistics(block, in_width, epsilon, C: tl.constexpr):
    """Return each token's mean over channels and one over its deviation, (TOKENS,) each, of a (PARTS, TOKENS, PART) block.

    Squares are of what is left without the mean, so that nothing cancels.
    """
    values = block.to(tl.float32)
    means = tl.sum(tl.sum(values, 2), 0) / C
    centred = tl.where(in_width, values - means[None, :, None], 0.0)
    squares = tl.sum(tl.sum(centred * centred, 2), 0)
    return means, tl.rsqrt(squares / C + epsilon)


@triton.jit(do_not_specialize=["splits"])
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
