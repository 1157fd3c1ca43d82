"""The attention of a clip's query over its tokens with position, which are normalised in passing.

B clips, T frames, N tokens of a frame, K = T N tokens of a clip, C channels, H heads.
Source: section 3.2 of arXiv 2208.03550.

Three kernels: statistics and logits of some tokens; each head's sum of exponentials; the weighted mean of some channels.
Tokens are read twice, each time for one product whose sums fit in registers. One reading for both would keep a clip's
sums of all channels in every program: on an H100 that took six times as long.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# 64 rows are the least that Hopper's matrix instruction takes. Of the sizes tried on an H100, these were the fastest.
# float32 values take twice the memory, and outside the matrix units more registers than larger blocks leave.
TOKENS, CHANNELS, WIDE_CHANNELS = 64, 128, 64
MEAN_CHANNELS, MEAN_WIDE_CHANNELS = 256, 64
WARPS, MEAN_WARPS, STAGES = 4, 8, 3
# Matrix units multiply sixteen columns at a time. More heads are taken by other programs, which find the tokens in the
# L2 cache.
HEADS = 16
# Logits of a head that are added up at a time.
LOGITS = 2048


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

    A clip's results are the same bits in every batch.

    Args:
        y: tokens with position, (B, T, N, C), contiguous; bfloat16, float16 or float32, in which products are made.
        query: float32 (B, H, C), with mean zero over channels.
        epsilon: added to the variance.
        tf32: whether products of float32 may be rounded to TF32.
    """
    clips, frames, per_frame, width = y.shape
    count, heads = frames * per_frame, query.shape[1]
    groups = triton.cdiv(heads, HEADS)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=y.device)

    result = Attended(
        mean=empty(clips, heads, width),
        row_mean=empty(clips, count),
        scale=empty(clips, count),
        logits=empty(clips, heads, count),
        log_total=empty(clips, heads),
    )
    is_wide = y.dtype == torch.float32
    channels, mean_channels = (WIDE_CHANNELS, MEAN_WIDE_CHANNELS) if is_wide else (CHANNELS, MEAN_CHANNELS)
    sizes = {"H": heads, "C": width, "HEADS": HEADS, "TOKENS": TOKENS}
    how = {"PRECISION": "tf32" if tf32 else "ieee", "num_stages": STAGES}
    _logits[(clips * triton.cdiv(count, TOKENS) * groups,)](
        y, query.to(y.dtype).contiguous(), result.row_mean, result.scale, result.logits, epsilon, count,
        **sizes, CHANNELS=channels, num_warps=WARPS, **how,
    )  # fmt: skip
    top = empty(clips, heads)
    _log_totals[(clips * heads,)](
        result.logits, result.scale, result.log_total, top, count, H=heads, LOGITS=LOGITS, num_warps=WARPS
    )
    _mean[(clips * triton.cdiv(width, mean_channels) * groups,)](
        y, result.row_mean, result.scale, result.logits, result.log_total, top, result.mean, count,
        **sizes, CHANNELS=mean_channels, num_warps=WARPS if is_wide else MEAN_WARPS, **how,
    )  # fmt: skip
    return result


@triton.jit
def _logits(
    y,
    query,
    row_mean,
    scale,
    logits,
    epsilon,
    count,
    H: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write means over channels, scales and logits of a block of one clip's tokens.

    Squares are taken from the mean of each block of channels, and blocks are put together, so that nothing cancels.
    """
    GROUPS: tl.constexpr = (H + HEADS - 1) // HEADS
    blocks = tl.cdiv(count, TOKENS)
    group = tl.program_id(0) % GROUPS
    block = tl.program_id(0) // GROUPS % blocks
    clip = (tl.program_id(0) // (GROUPS * blocks)).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    head = group * HEADS + tl.arange(0, HEADS)
    is_token, is_head = token < count, head < H
    rows = y + (clip * count + token)[:, None] * C
    columns = query + (clip * H + head)[None, :] * C

    products = tl.zeros((TOKENS, HEADS), tl.float32)
    query_total = tl.zeros((HEADS,), tl.float32)
    means = tl.zeros((TOKENS,), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, C, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        in_width = channel < C
        values = tl.load(rows + channel[None, :], mask=is_token[:, None] & in_width[None, :], other=0)
        q = tl.load(columns + channel[:, None], mask=is_head[None, :] & in_width[:, None], other=0)
        products = tl.dot(values, q, products, input_precision=PRECISION)
        # Rounding leaves the query a small mean, which would let the tokens' means into their logits.
        query_total += tl.sum(q.to(tl.float32), 0)
        width = tl.minimum(C - first, CHANNELS).to(tl.float32)
        wide = values.to(tl.float32)
        block_means = tl.sum(wide, 1) / width
        centred = tl.where(in_width[None, :], wide - block_means[:, None], 0.0)
        apart, share = block_means - means, width / (first + width)
        squares += tl.sum(centred * centred, 1) + apart * apart * (first * share)
        means += apart * share

    scales = tl.rsqrt(squares / C + epsilon)
    tl.store(row_mean + clip * count + token, means, mask=is_token & (group == 0))
    tl.store(scale + clip * count + token, scales, mask=is_token & (group == 0))
    found = (products - means[:, None] * query_total[None, :]) * scales[:, None]
    places = logits + (clip * H + head)[None, :] * count + token[:, None]
    tl.store(places, found, mask=is_token[:, None] & is_head[None, :])


@triton.jit
def _log_totals(logits, scale, log_total, top, count, H: tl.constexpr, LOGITS: tl.constexpr):
    """Write the logarithm of one head's sum of exponentials of logits, and that of its largest exp(logit) scale."""
    row = tl.program_id(0).to(tl.int64)  # of (B, H)
    total, largest, top_weight = 0.0, -float("inf"), -float("inf")
    for first in range(0, count, LOGITS):
        token = first + tl.arange(0, LOGITS)
        is_token = token < count
        found = tl.load(logits + row * count + token, mask=is_token, other=-float("inf"))
        scales = tl.load(scale + row // H * count + token, mask=is_token, other=1.0)
        new_largest = tl.maximum(largest, tl.max(found, 0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(found - new_largest), 0)
        top_weight = tl.maximum(top_weight, tl.max(found + tl.log(scales), 0))
        largest = new_largest
    tl.store(log_total + row, largest + tl.log(total))
    tl.store(top + row, top_weight)


@triton.jit
def _mean(
    y,
    row_mean,
    scale,
    logits,
    log_total,
    top,
    mean,
    count,
    H: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write some channels of one clip's weighted mean: the sum over tokens of exp(logit) scale (token - its mean).

    Weights are taken relative to the largest, so that none passes 1 and the largest is 1: float16 could not hold others.
    """
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    GROUPS: tl.constexpr = (H + HEADS - 1) // HEADS
    program = tl.program_id(0)
    group = program // BLOCKS % GROUPS
    clip = (program // (BLOCKS * GROUPS)).to(tl.int64)
    channel = program % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    head = group * HEADS + tl.arange(0, HEADS)
    in_width, is_head = channel < C, head < H
    largest = tl.load(top + clip * H + head, mask=is_head, other=0)
    total = tl.zeros((CHANNELS, HEADS), tl.float32)
    offset = tl.zeros((HEADS,), tl.float32)
    for first in range(0, count, TOKENS):
        token = first + tl.arange(0, TOKENS)
        is_token = token < count
        mask = is_token[:, None] & is_head[None, :]
        places = logits + (clip * H + head)[None, :] * count + token[:, None]
        found = tl.load(places, mask=mask, other=-float("inf"))
        scales = tl.load(scale + clip * count + token, mask=is_token, other=1.0)
        means = tl.load(row_mean + clip * count + token, mask=is_token, other=0)
        exponents = found + tl.log(scales)[:, None] - largest[None, :]
        weights = tl.where(mask, tl.exp(exponents), 0.0).to(y.dtype.element_ty)
        offset += tl.sum(weights.to(tl.float32) * means[:, None], 0)
        rows = y + (clip * count + token)[:, None] * C
        values = tl.load(rows + channel[None, :], mask=is_token[:, None] & in_width[None, :], other=0)
        total = tl.dot(tl.trans(values), weights, total, input_precision=PRECISION)

    share = tl.exp(largest - tl.load(log_total + clip * H + head, mask=is_head, other=0))
    places = mean + (clip * H + head)[None, :] * C + channel[:, None]
    tl.store(places, (total - offset[None, :]) * share[None, :], mask=in_width[:, None] & is_head[None, :])
