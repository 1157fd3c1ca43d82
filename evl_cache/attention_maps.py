"""Adjacent-frame attention maps: where a patch of one frame finds itself in the frame before and after.

B clips, T frames, P patches, H heads, D head width.
Source: section 3.3 of arXiv 2208.03550.
"""

import torch

from evl_cache.errors import UsageError


def adjacent_frame_maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Attention of each frame's patch queries over the neighbouring frame's patch keys, mean over heads.

    Args:
        q, k: (B, T, 1+P, H, D), class token first, T >= 2. The class token takes no part.

    Returns: (B, 2, T-1, P, P), dtype of q: [:, 0, t] is frame t+1 against frame t ("prev"),
        [:, 1, t] is frame t against frame t+1 ("next"). Each row sums to one. The softmax is taken in
        float32 whatever the dtype.
    Raises: UsageError for unequal shapes or a single frame.
    """
    if q.shape != k.shape or q.ndim != 5:
        raise UsageError(
            f"q is {tuple(q.shape)} and k is {tuple(k.shape)}; expected the same (B, T, 1+P, H, D) twice"
        )
    if q.shape[1] < 2:
        raise UsageError("adjacent-frame maps of 1 frame: expected at least 2 frames")
    scaled = q[:, :, 1:].permute(0, 1, 3, 2, 4) * q.shape[-1] ** -0.5  # (B,T,H,P,D)
    keys = k[:, :, 1:].permute(0, 1, 3, 4, 2)  # (B,T,H,D,P)
    maps = q.new_empty(q.shape[0], 2, q.shape[1] - 1, q.shape[2] - 1, q.shape[2] - 1)
    for clip in range(q.shape[0]):  # one clip at a time: the per-head maps are H times the result
        maps[clip, 0] = _mean_attention(scaled[clip, 1:], keys[clip, :-1])
        maps[clip, 1] = _mean_attention(scaled[clip, :-1], keys[clip, 1:])
    return maps


def _mean_attention(q: torch.Tensor, k_transposed: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k_transposed)  # (T-1,H,P,P)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).mean(dim=1)
