"""Parts that several heads are made of: attention of one query, self-attention, MLP, convolution over frames.

B clips, S sequences (frames of clips, or clips), K tokens of a sequence, C channels, H attention heads, D their width.
"""

import torch
from torch import Tensor, nn

from evl_cache.errors import UsageError
from evl_cache.heads.layer_tokens import LayerTokens
from evl_cache.heads.tracing import is_transformed


class QueryAttention(nn.Module):
    """One query attends to tokens.

    Keys and values are never projected: `decoder/fast_attention.py` says why the result is the same.
    A key bias would move all logits of a head alike, so there is none.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))
        self.k_proj = nn.Linear(width, width, bias=False)
        initialise(self)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Return (B, C) for a query (B, C) and normalised tokens (B, K, C)."""
        by_head = (self.num_heads, -1, query.shape[-1])  # (H,D,C)
        q = self.q_proj(query).unflatten(-1, (self.num_heads, -1))  # (B,H,D)
        carried = torch.einsum("bhd,hdc->bhc", q, self.k_proj.weight.view(by_head)) * q.shape[-1] ** -0.5
        weights = torch.softmax(carried @ tokens.transpose(1, 2), dim=-1)  # (B,H,K)
        mean = weights.to(tokens.dtype) @ tokens  # (B,H,C)
        values = torch.einsum("bhc,hdc->bhd", mean, self.v_proj.weight.view(by_head)).flatten(1)
        result: Tensor = self.out_proj(values + self.v_proj.bias)
        return result


class SelfAttention(nn.Module):
    """Multi-head self-attention over the tokens of each sequence."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return (S, K, C), the shape of `x`."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (S,H,K,D)
        if torch.compiler.is_compiling() or not is_transformed():
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
        else:  # torch's fused attention has no derivative of a derivative, and none forward
            attended = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v
        result: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return result


class MLP(nn.Sequential):
    """Linear, activation, linear; the hidden layer is `expansion` times as wide."""

    def __init__(self, width: int, activation: nn.Module | None = None, *, expansion: int = 4) -> None:
        hidden = expansion * width
        super().__init__(nn.Linear(width, hidden), activation or nn.GELU(), nn.Linear(hidden, width))
        initialise(self)


def normalised(tokens: LayerTokens, norm: nn.LayerNorm) -> Tensor:
    """Return `norm` of the tokens (B, T, N, C); all heads that read them share their mean and deviation."""
    return tokens.unit * norm.weight + norm.bias


def over_frames(tokens: Tensor, conv: nn.Conv1d) -> Tensor:
    """Return a depthwise convolution over the frames of each token position, (B, T, K, C) as `tokens` is."""
    batch, frames, count, width = tokens.shape
    series = tokens.permute(0, 2, 3, 1).reshape(batch * count, width, frames)
    moved: Tensor = conv(series)
    return moved.view(batch, count, width, frames).permute(0, 3, 1, 2)


def initialise(module: nn.Module) -> None:
    """Set linear layers to Xavier uniform weights and zero biases, as the published decoder begins."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def zero(*layers: nn.Module) -> None:
    """Set all parameters to zero, so that a residual branch adds nothing at first."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def check_heads(width: int, num_heads: int) -> None:
    """Check attention heads. Raises: UsageError where they do not divide the width."""
    if width % num_heads:
        raise UsageError(f"{num_heads} heads do not divide the head's width of {width}; expected a divisor")
