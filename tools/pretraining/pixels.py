"""Pictures as evl-tiny sees them: normalised as `evl-cache extract` does it."""

import numpy as np
import numpy.typing as npt
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from evl_cache.preprocess import normalised


def normalise(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """uint8 (B, side, side, 3) -> float32 (B, 3, side, side)."""
    return normalised(torch.from_numpy(pixels), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
