"""Twins of the heads beyond EVL, written the obvious way from their papers: every key and value is projected.

Each takes a head, whose parameters it reads, and float tokens (B, T, 1+P, C) of each layer; it returns logits.
"""

import torch
import torch.nn.functional as F

from evl_cache.heads.attentive import AttentiveHead
from evl_cache.heads.ladder import LadderHead
from evl_cache.heads.linear import LinearHead
from evl_cache.heads.meanpool import MeanPoolHead
from evl_cache.heads.mlap import MLAPHead
from evl_cache.heads.uniformerv2 import UniFormerV2Head


def norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias


def attention(q, k, v, heads):
    """Softmax attention, a head at a time: q (B, Q, C), k and v (B, K, C)."""
    out = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        weights = torch.softmax(qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5, -1)
        out.append(weights @ vh)
    return torch.cat(out, -1)


def query_attention(layer, query, memory):
    """query (B, C), memory (B, K, C)."""
    attended = attention(
        layer.q_proj(query)[:, None], layer.k_proj(memory), layer.v_proj(memory), layer.num_heads
    )
    return layer.out_proj(attended[:, 0])


def self_attention(layer, x):
    q, k, v = layer.qkv_proj(x).chunk(3, -1)
    return layer.out_proj(attention(q, k, v, layer.num_heads))


def gelu_mlp(layer, x):
    hidden = layer[0](x)
    return layer[2](hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))


def linear(head, tokens):
    return head.classifier(
        torch.cat([norm(t[:, :, 0].mean(1), n) for t, n in zip(tokens, head.norms, strict=True)], 1)
    )


def meanpool(head, tokens):
    pooled = [norm(t.flatten(1, 2).mean(1), n) for t, n in zip(tokens, head.norms, strict=True)]
    return head.classifier(torch.cat(pooled, 1))


def attentive(head, tokens):
    (x,) = tokens
    if head.config["temporal_pos_embed"]:
        x = torch.stack([x[:, t] + head.pos_embed[t] for t in range(x.shape[1])], 1)
    x = x.flatten(1, 2)
    for block in head.blocks:
        x = x + self_attention(block.attention, norm(x, block.norm1))
        x = x + gelu_mlp(block.mlp, norm(x, block.norm2))
    q = head.query.repeat(len(x), 1)
    q = q + query_attention(head.pool.attention, q, norm(x, head.pool.norm1))
    q = q + gelu_mlp(head.pool.mlp, norm(q, head.pool.norm2))
    return head.classifier(q)


def mlap(head, tokens):
    q = head.query.repeat(len(tokens[0]), 1)
    for block, layer in zip(head.blocks, tokens, strict=True):
        if head.config["temporal_pos_embed"]:
            layer = torch.stack([layer[:, t] + block.pos_embed[t] for t in range(layer.shape[1])], 1)
        memory = norm(layer.flatten(1, 2), block.norm3)
        q = q + query_attention(block.attention, norm(q, block.norm1), memory)
        q = q + gelu_mlp(block.mlp, norm(q, block.norm2))
    return head.classifier(norm(q, head.norm))


def convolved(patches, conv):
    """Depthwise 3x3x3 of (B, T, Hp, Wp, C), tap by tap, zero outside."""
    padded = F.pad(patches, (0, 0, 1, 1, 1, 1, 1, 1))
    T, H, W = patches.shape[1:4]
    out = torch.zeros_like(patches) + conv.bias
    for t in range(3):
        for i in range(3):
            for j in range(3):
                out = out + conv.weight[:, 0, t, i, j] * padded[:, t : t + T, i : i + H, j : j + W]
    return out


def uniformerv2(head, tokens):
    q = head.query.repeat(len(tokens[0]), 1)
    for block, layer in zip(head.blocks, tokens, strict=True):
        y = layer
        if block.conv is not None:
            patches = layer[:, :, 1:].unflatten(2, head.grid)
            patches = patches + convolved(patches, block.conv)
            y = torch.cat([layer[:, :, :1], patches.flatten(2, 3)], 2)
        q = q + query_attention(block.attention, norm(q, block.norm1), norm(y, block.norm3).flatten(1, 2))
        hidden = block.mlp[0](norm(q, block.norm2))
        q = q + block.mlp[2](hidden * torch.sigmoid(1.702 * hidden))
    share = 1 / (1 + torch.exp(-head.balance))
    last = tokens[-1][:, :, 0].mean(1)
    return head.classifier(norm((1 - share) * q + share * last, head.norm))


def ladder(head, tokens):
    h = torch.zeros(())
    for block, layer in zip(head.blocks, tokens, strict=True):
        h = h + block.down(norm(layer, block.norm))
        T, W = h.shape[1], h.shape[3]
        if block.conv is not None:
            taps = block.conv.weight[:, 0]
            frames = [h[:, t] for t in range(T)]
            zero = torch.zeros_like(frames[0])
            around = [zero, *frames, zero]
            h = torch.stack(
                [
                    frames[t]
                    + taps[:, 0] * around[t]
                    + taps[:, 1] * around[t + 1]
                    + taps[:, 2] * around[t + 2]
                    + block.conv.bias
                    for t in range(T)
                ],
                1,
            )
        unit = norm(h, block.norm1)
        shifted = unit.clone()
        for t in range(T):
            for c in range(W // 4):
                shifted[:, t, 0, c] = unit[:, t + 1, 0, c] if t + 1 < T else 0
                d = W // 4 + c
                shifted[:, t, 0, d] = unit[:, t - 1, 0, d] if t else 0
        attended = [self_attention(block.attention, shifted[:, t]) for t in range(T)]
        h = h + torch.stack(attended, 1)
        h = h + gelu_mlp(block.mlp, norm(h, block.norm2))
    return head.classifier(norm(h, head.norm).flatten(1, 2).mean(1))


TWINS = {
    LinearHead: linear,
    MeanPoolHead: meanpool,
    AttentiveHead: attentive,
    MLAPHead: mlap,
    UniFormerV2Head: uniformerv2,
    LadderHead: ladder,
}
