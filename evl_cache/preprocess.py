"""Make a tower's input from decoded frames, exactly as the official test loader does.

T frames, H and W source pixels, S the tower's image size.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from evl_cache.errors import ClipError, UsageError


def spatial_crops(
    frames: np.ndarray | torch.Tensor,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crops: int = 1,
) -> torch.Tensor:
    """Scale frames to [0, 1], normalise them, resize the short side to `size` and cut crops along the long side.

    Resizing is bilinear with `align_corners=False`, without antialias, in float32. The published figures depend on
    this order and filter of the official loader.

    Args:
        frames: uint8 (T, H, W, 3), RGB.
        size: side of the square crop in pixels.
        mean: of each colour channel, in units of [0, 1].
        std: of each colour channel, in units of [0, 1].
        crops: 1 (centre) or 3 (start, middle, end of the long side).

    Returns: float32 (crops, T, 3, size, size).
    Raises: UsageError for other shapes, dtypes or crop counts; ClipError for frames without pixels.
    """
    if len(mean) != 3 or len(std) != 3 or size < 1:
        raise UsageError(
            f"size {size}, mean {mean}, std {std}; expected a size of at least 1 and three numbers each"
        )
    if isinstance(frames, np.ndarray):
        # torch warns of an array that is read-only, and takes none with negative strides.
        frames = np.require(frames, requirements=["C", "W"])
    tensor = torch.as_tensor(frames)
    if tensor.ndim != 4 or tensor.shape[-1] != 3 or tensor.dtype != torch.uint8:
        raise UsageError(f"frames are {tensor.dtype} {tuple(tensor.shape)}; expected uint8 (T, H, W, 3), RGB")
    if 0 in tensor.shape:
        raise ClipError(
            f"frames of shape {tuple(tensor.shape)} hold no pixels; expected at least one frame and pixel"
        )
    if crops not in (1, 3):
        raise UsageError(f"spatial views: got {crops}; expected 1 (centre) or 3 (start, middle, end)")
    height, width = tensor.shape[1:3]
    short = min(height, width)
    pixels = normalised(tensor, mean, std)  # (T,3,H,W)
    scaled = (height * size // short, width * size // short)
    if scaled != (height, width):
        pixels = resized(pixels, scaled)
    return torch.stack([_crop(pixels, offset, size) for offset in _offsets(max(scaled) - size, crops)])


class _ThisThread(threading.local):
    """How the calling thread resizes."""

    as_several = False


_THIS_THREAD = _ThisThread()


def resize_as_several_threads() -> None:
    """Have this thread resize to the same bits as several threads together, although it computes alone."""
    _THIS_THREAD.as_several = True


def resized(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return pictures, float32 (T, 3, H, W), in another size: bilinear, without antialias.

    torch resizes three channels by another kernel where it has one thread than where it has several; they round
    differently. It has a single kernel for one channel, that of several threads.
    """
    if not _THIS_THREAD.as_several:
        return _interpolated(pixels, size)
    planes = _interpolated(pixels.reshape(-1, 1, *pixels.shape[2:]), size)
    return planes.view(*pixels.shape[:2], *size)


def _interpolated(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)


def normalised(frames: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Return uint8 frames (T, H, W, 3) as normalised float32 (T, 3, H, W): (frames / 255 - mean) / std."""
    pixels = (
        frames.permute(0, 3, 1, 2).to(torch.float32).div_(255.0)
    )  # of the copy, in place: frames may be large
    shift = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
    return pixels.sub_(shift).div_(scale)


def _offsets(margin: int, crops: int) -> list[int]:
    return [margin // 2] if crops == 1 else [0, margin // 2, margin]


def _crop(pixels: torch.Tensor, offset: int, size: int) -> torch.Tensor:
    if pixels.shape[-2] > pixels.shape[-1]:
        return pixels[..., offset : offset + size, :]
    return pixels[..., offset : offset + size]
