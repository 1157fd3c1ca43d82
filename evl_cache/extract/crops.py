"""Samples of clips, made from frames as they come, so that few large frames are held at a time.

T frames of a view, V views of a clip, H and W source pixels, S the model's image size.
"""

from collections.abc import Sequence

import numpy as np
import torch

from evl_cache.extract.augmentation import ViewAugmentation
from evl_cache.preprocess import spatial_crops
from evl_cache.spec import TowerSpec, ViewSpec
from evl_cache.video import ClipHeader


class _Views:
    """Samples of the clips of one file, from frames as they come.

    Args:
        header: of the frames, the views of one clip after those of another.
        clips: how many of them have views.
        tower: gives the size.
        spatial: views of each temporal one.

    Attributes:
        indices: frame numbers in the file, int64 (clips, V, T).
        samples: of each clip, float32 (spatial x V, T, 3, S, S).
    """

    def __init__(self, header: ClipHeader, clips: int, tower: TowerSpec, spatial: int) -> None:
        self.header, self._tower = header, tower
        shape = (clips, -1, header.indices.shape[-1])
        self.indices, self._positions = header.indices.reshape(shape), header.positions.reshape(shape)
        size = tower.image_size
        # Of each clip its own memory, which goes with it.
        self._crops = [torch.empty(spatial, *views.shape, 3, size, size) for views in self.indices]
        self.samples = [crops.flatten(0, 1) for crops in self._crops]  # the same memory
        self._added = 0


class CroppedViews(_Views):
    """Crops of temporal views."""

    def __init__(self, header: ClipHeader, clips: int, tower: TowerSpec, views: ViewSpec) -> None:
        super().__init__(header, clips, tower, views.spatial_views)

    def add(self, frames: np.ndarray) -> None:
        """Take the next distinct frames of the header, uint8 (some, H, W, 3)."""
        tower = self._tower
        crops = spatial_crops(
            frames, size=tower.image_size, mean=tower.mean, std=tower.std, crops=len(self._crops[0])
        )  # (crops,some,3,S,S)
        for number in range(len(frames)):
            for clip, view, t in np.argwhere(self._positions == self._added + number).tolist():
                self._crops[clip][:, view, t] = crops[:, number]
        self._added += len(frames)


class AugmentedViews(_Views):
    """Augmented training views; their random parts are drawn before the first frame.

    Args:
        generators: of the views of each clip, from which their frames were drawn already.
    """

    def __init__(
        self,
        header: ClipHeader,
        generators: Sequence[Sequence[np.random.Generator]],
        tower: TowerSpec,
        views: ViewSpec,
    ) -> None:
        super().__init__(header, len(generators), tower, 1)
        height, width = header.frame_size
        self._augmentations = [
            [ViewAugmentation.draw(rng, height=height, width=width, flip=views.flip) for rng in of_clip]
            for of_clip in generators
        ]

    def add(self, frames: np.ndarray) -> None:
        """Take the next distinct frames of the header, uint8 (some, H, W, 3)."""
        tower = self._tower
        for frame in frames:
            for clip, view in np.argwhere((self._positions == self._added).any(axis=2)).tolist():
                places = np.flatnonzero(self._positions[clip, view] == self._added)
                self.samples[clip][view, places] = self._augmentations[clip][view].apply(
                    frame[None], size=tower.image_size, mean=tower.mean, std=tower.std
                )
            self._added += 1
