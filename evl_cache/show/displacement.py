"""Compute where patches move from one frame to the next, from adjacent-frame attention maps.

T frames, P patches (grid Hp x Wp, row by row).
"""

import torch


def displacements(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return every patch's displacement from frame t to frame t+1, in patches, (T-1, P, 2): down, right.

    Where attention is spread out, the expectation of a map is biased towards the middle of the picture. The bias is the
    same in both directions of a pair of frames, and motion is opposite. So half the difference of the two expectations
    keeps the motion without the bias, and is zero for two equal frames.

    Args:
        maps: of one clip as `adjacent_frame_maps` returns them, (2, T-1, P, P); [0, t] is frame t+1 against t.
        grid: patches (Hp, Wp).
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).to(torch.float32)  # (P,2)
    backward, forward = (maps.float() @ places) - places  # (T-1,P,2) each
    found: torch.Tensor = (forward - backward) / 2
    return found
