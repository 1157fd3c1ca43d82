"""Gradients of the query and of the tokens with position, from the gradient of the weighted mean, in one kernel.

B clips, T frames, N tokens of a frame, K = T N tokens of a clip, C channels, H heads. Names in capitals are known when
a kernel is compiled.

Let y be a token with position, m its mean over channels, r one over its deviation, n = r (y - m). For head h, let p_h be
the token's weight, q_h the query and g_h the gradient of the mean, both with mean zero over channels. Then the logit's
gradient is d_h = p_h (g_h . n - g_h . mean_h), the query's is the sum of d_h n over tokens, and the token's is
r (sum_h (d_h q_h + p_h g_h) - n sum_h (d_h q_h . n + p_h g_h . n) / C).

Neither product that reads tokens needs n as a tensor: g_h . n = r (g_h . y - m sum(g_h)), and the sum of d_h n is the
sum of (d_h r) y less a number. So tokens go to the tensor cores as they lie in memory, and are not rounded again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evl_cache.heads.decoder.kernels.attention import Attended

# 64 rows are the least that Hopper's matrix instruction takes. A block of 64 tokens of 768 channels in two bytes is
# 96 KiB: its second reading comes out of the outermost cache, if not out of a processor's own.
BLOCK_TOKENS = 64
# Bytes of a token read at a time, a line of the cache. Three such blocks on their way are 40 KiB of shared memory, and a
# thread has a third of what is there for 128, so that three programs share a processor.
BLOCK_BYTES = 128
REGISTERS = 168
# Blocks of a program. 14x14 patches and 8 frames are 25 blocks, so 5 programs a clip: enough for 132 processors from
# some 80 clips on, while the partial sums of the query's gradient are a twentieth of the tokens. It depends on no batch
# size, so a clip's gradients are the same in every batch.
BLOCKS_PER_PROGRAM = 5


def attention_gradients(
    y: Tensor,
    query: Tensor,
    gradient: Tensor,
    attended: Attended,
    *,
    write_over: bool,
    wanted: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the query, float32 (B, H, C), and of `y`, like `y`; the latter None unless `wanted`.

    Sums are float32 and added in one order, so the same inputs give the same bits. Products are of values in y's dtype.

    Args:
        y: tokens with position, (B, T, N, C), contiguous.
        query: float32 (B, H, C).
        gradient: of the weighted mean, float32 (B, H, C).
        attended: what `attend` returned for `y` and `query`.
        write_over: whether y's gradient may take y's memory, whose values are then lost.
        wanted: whether y's gradient is needed.
        tf32: whether products of float32 values may be rounded to TF32.
    """
    clips, frames, count, width = y.shape
    heads, tokens = query.shape[1], frames * count
    # A token has mean zero over channels, so the means of these have no effect.
    query = (query - query.mean(-1, keepdim=True)).to(y.dtype).contiguous()
    gradient = (gradient - gradient.mean(-1, keepdim=True)).to(y.dtype).contiguous()
    # Of the rounded gradient: the logits' gradients of a head then sum to zero, as a softmax's do.
    expected = torch.linalg.vecdot(gradient.float(), attended.mean)
    programs = triton.cdiv(tokens, BLOCK_TOKENS * BLOCKS_PER_PROGRAM)
    parts = query.new_empty(clips, programs, heads, width, dtype=torch.float32)
    result = (y if write_over else torch.empty_like(y)) if wanted else None
    attention_gradients_kernel[(programs, clips)](
        y,
        query,
        gradient,
        expected,
        attended.row_mean,
        attended.scale,
        attended.logits,
        attended.log_total,
        parts,
        y if result is None else result,
        tokens,
        CHANNELS=width,
        HEADS=heads,
        **attention_blocks(heads, y.dtype, width),
        WANTED=wanted,
        PRECISION="tf32" if tf32 else "ieee",
        maxnreg=REGISTERS,
    )
    return parts.sum(1), result


def attention_blocks(heads: int, dtype: torch.dtype, width: int) -> dict[str, int]:
    """Return the sizes of blocks, by the names of the kernel's arguments."""
    return {
        "BLOCK_HEADS": max(16, triton.next_power_of_2(heads)),
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "BLOCK_CHANNELS": max(16, min(BLOCK_BYTES // dtype.itemsize, triton.next_power_of_2(width))),
        "BLOCKS": BLOCKS_PER_PROGRAM,
    }


@triton.jit
def attention_gradients_kernel(
    y,
    query,
    gradient,
    expected,
    row_mean,
    scale,
    logits,
    log_total,
    parts,
    result,
    tokens_of_clip,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WANTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One clip's `BLOCKS` blocks of tokens. All are read as `attention_gradients` says; query and gradient centred.

    Written: `parts` (B, programs of a clip, H, C), whose sum over programs is the query's gradient, and `result`
    (B, K, C), which may be `y`. A program adds up its own row of `parts` in memory, block by block: it is too large for
    registers, and stays in a cache.
    """
    clip = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    heads = tl.arange(0, BLOCK_HEADS)
    in_heads = heads < HEADS
    y += clip * tokens_of_clip * CHANNELS
    result += clip * tokens_of_clip * CHANNELS
    query += clip * HEADS * CHANNELS
    gradient += clip * HEADS * CHANNELS
    logits += clip * HEADS * tokens_of_clip
    parts += (clip * tl.num_programs(0) + program) * HEADS * CHANNELS
    top = tl.load(log_total + clip * HEADS + heads, mask=in_heads, other=0)
    middle = tl.load(expected + clip * HEADS + heads, mask=in_heads, other=0)

    for block in range(BLOCKS):
        tokens = (program * BLOCKS + block) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        in_clip = tokens < tokens_of_clip
        token_mean = tl.load(row_mean + clip * tokens_of_clip + tokens, mask=in_clip, other=0)
        token_scale = tl.load(scale + clip * tokens_of_clip + tokens, mask=in_clip, other=0)

        # First over all channels: the gradient of each weight.
        products = tl.zeros((BLOCK_TOKENS, BLOCK_HEADS), tl.float32)
        total = tl.zeros((BLOCK_HEADS, BLOCK_CHANNELS), tl.float32)
        for start in tl.range(0, CHANNELS, BLOCK_CHANNELS):
            channels = start + tl.arange(0, BLOCK_CHANNELS)
            in_width = channels < CHANNELS
            places = tokens[:, None] * CHANNELS + channels[None, :]
            values = tl.load(y + places, mask=in_clip[:, None] & in_width[None, :], other=0)
            places = heads[:, None] * CHANNELS + channels[None, :]
            ends = tl.load(gradient + places, mask=in_heads[:, None] & in_width[None, :], other=0)
            products = tl.dot(values, tl.trans(ends), products, input_precision=PRECISION)
            total += ends.to(tl.float32)
        weight_gradient = products - token_mean[:, None] * tl.sum(total, 1)[None, :]
        weight_gradient *= token_scale[:, None]

        places = heads[None, :] * tokens_of_clip + tokens[:, None]
        inside = in_clip[:, None] & in_heads[None, :]
        logit = tl.load(logits + places, mask=inside, other=0)
        weight = tl.where(inside, tl.exp(logit - top[None, :]), 0)
        logit_gradient = weight * (weight_gradient - middle[None, :])
        along = tl.sum(logit_gradient * logit + weight * weight_gradient, 1)
        shrink = along * token_scale * token_scale / CHANNELS

        # Then again over all channels: what the block adds to the query's gradient, and its tokens' gradient.
        to_query = (logit_gradient * token_scale[:, None]).to(y.dtype.element_ty)
        # The tokens' means, which the product with tokens as they lie has too much.
        excess = tl.sum(to_query.to(tl.float32) * token_mean[:, None], 0)
        by_query, by_gradient = logit_gradient.to(y.dtype.element_ty), weight.to(y.dtype.element_ty)
        for start in tl.range(0, CHANNELS, BLOCK_CHANNELS):
            channels = start + tl.arange(0, BLOCK_CHANNELS)
            in_width = channels < CHANNELS
            token_places = tokens[:, None] * CHANNELS + channels[None, :]
            of_tokens = in_clip[:, None] & in_width[None, :]
            head_places = heads[:, None] * CHANNELS + channels[None, :]
            of_heads = in_heads[:, None] & in_width[None, :]
            before = tl.load(parts + head_places, mask=of_heads & (block > 0), other=0)
            values = tl.load(y + token_places, mask=of_tokens, other=0)
            added = tl.dot(tl.trans(to_query), values, input_precision=PRECISION) - excess[:, None]
            tl.store(parts + head_places, before + added, mask=of_heads)
            if WANTED:
                ends = tl.load(query + head_places, mask=of_heads, other=0)
                back = tl.dot(by_query, ends, input_precision=PRECISION)
                ends = tl.load(gradient + head_places, mask=of_heads, other=0)
                back = tl.dot(by_gradient, ends, back, input_precision=PRECISION)
                centred = values.to(tl.float32) - token_mean[:, None]
                back = back * token_scale[:, None] - centred * shrink[:, None]
                tl.store(result + token_places, back.to(y.dtype.element_ty), mask=of_tokens)
        # What a thread stored in `parts`, another may load for the next block.
        tl.debug_barrier()
