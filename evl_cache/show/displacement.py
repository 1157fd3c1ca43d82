"""Where patches go from one frame to the next, as adjacent-frame attention maps tell it.

T frames, P patches (grid Hp x Wp, row by row).
"""

import torch


def displacements(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Displacement of every patch from frame t to frame t+1, in patches, (T-1, P, 2): down, right.

    A map's expectation alone is drawn to the middle of the picture wherever attention is spread out. That pull is the
    same in both directions of a pair of frames, while motion turns round: half the difference of the two
    expectations keeps the motion and loses the pull, and is zero for two equal frames.

    Args:
        maps: (2, T-1, P, P), as `adjacent_frame_maps` gives them for one clip; [0, t] is frame t+1 against t.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).to(torch.float32)  # (P,2)
    backward, forward = (maps.float() @ places) - places  # (T-1,P,2) each
    found: torch.Tensor = (forward - backward) / 2
    return found
