"""Augmented training views: RandAugment on the frames, then one random resized crop. The only module that knows timm.

What is drawn for a view follows from (seed, clip id, view number) alone, so a view is the same wherever and whenever
it is made. T frames, H and W source pixels, S the model's image size.
Source: the published training recipe, `rand-m7-n4-mstd0.5-inc1` as timm defines it, and RandomResizedCrop.
"""

import hashlib
import math
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evl_cache.errors import ClipError
from evl_cache.preprocess import normalised, resized

_OPERATIONS = 4  # n4
_MAGNITUDE, _MAGNITUDE_STD, _LARGEST = 7.0, 0.5, 10.0  # m7, mstd0.5
_PROBABILITY = 0.5  # of each operation
_FILL = (128, 128, 128)
_TRANSLATE = 0.45  # of the short side
_AREA, _ASPECT, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
# timm draws signs from Python's own generator, which threads share.
_sign_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of RandAugment: timm's name, and its arguments (none for those without a magnitude)."""

    name: str
    arguments: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Box:
    """A crop in source pixels."""

    top: int
    left: int
    height: int
    width: int


def view_generator(seed: int, clip_id: str, view: int) -> np.random.Generator:
    """The generator from which everything random in a view is drawn, its frames first."""
    key = hashlib.sha256(f"{seed}\0{view}\0{clip_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(key, "little"))


def draw_operations(rng: np.random.Generator, *, short_side: int) -> tuple[Operation, ...]:
    """The operations to apply, in order: four are drawn with replacement, and each is kept with probability 1/2."""
    from timm.data import auto_augment

    # Magnitudes that increase with the level (inc1); shifts are in pixels of the short side, not of each side.
    names = [name.replace("Rel", "") for name in auto_augment._RAND_INCREASING_TRANSFORMS]
    hparams = {"translate_const": int(short_side * _TRANSLATE)}
    drawn = []
    for name in rng.choice(names, _OPERATIONS).tolist():
        happens, level = rng.random() < _PROBABILITY, rng.normal(_MAGNITUDE, _MAGNITUDE_STD)
        sign_seed = int(rng.integers(2**63))
        to_arguments: Any = auto_augment.LEVEL_TO_ARG[name]
        if not happens:
            continue
        arguments: tuple[float, ...] = ()
        if to_arguments is not None:
            with _sign_lock:
                before = random.getstate()
                random.seed(sign_seed)
                arguments = tuple(to_arguments(min(max(level, 0.0), _LARGEST), hparams))
                random.setstate(before)
        drawn.append(Operation(name=name, arguments=arguments))
    return tuple(drawn)


def draw_box(rng: np.random.Generator, height: int, width: int) -> Box:
    """A box of 0.08 to 1 of the area and aspect 3/4 to 4/3 (width to height); where none fits, the largest in the centre."""
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*_AREA)
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h, endpoint=True))
            return Box(top=top, left=int(rng.integers(0, width - w, endpoint=True)), height=h, width=w)
    aspect = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return Box(top=(height - h) // 2, left=(width - w) // 2, height=h, width=w)


def apply_operations(frames: np.ndarray, operations: Sequence[Operation]) -> np.ndarray:
    """Do the same operations on every frame, uint8 (T, H, W, 3), bicubic; pixels from outside are grey 128."""
    from PIL import Image
    from timm.data import auto_augment

    settings: dict[str, Any] = {"fillcolor": _FILL, "resample": Image.Resampling.BICUBIC}
    out = []
    for frame in frames:
        image = Image.fromarray(np.ascontiguousarray(frame))
        for operation in operations:
            apply: Any = auto_augment.NAME_TO_OP[operation.name]
            image = apply(image, *operation.arguments, **settings)
        out.append(np.asarray(image))
    return np.stack(out)


@dataclass(frozen=True, kw_only=True)
class ViewAugmentation:
    """What is drawn for one training view; it is the same for all its frames."""

    operations: tuple[Operation, ...]
    box: Box
    is_mirrored: bool

    @classmethod
    def draw(
        cls, rng: np.random.Generator, *, height: int, width: int, flip: bool = False
    ) -> "ViewAugmentation":
        """Draw one for frames of H x W pixels. Raises: ClipError for frames without pixels."""
        if height < 1 or width < 1:
            raise ClipError(f"frames of {height} x {width} hold no pixels")
        return cls(
            operations=draw_operations(rng, short_side=min(height, width)),
            box=draw_box(rng, height, width),
            is_mirrored=bool(rng.random() < 0.5) and flip,
        )

    def apply(
        self, frames: np.ndarray, *, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> torch.Tensor:
        """The view of some of its frames.

        Args:
            frames: uint8 (T, H, W, 3), RGB.
            size: of the model's image.
            mean: three numbers in units of [0, 1].
            std: three numbers in units of [0, 1].

        Returns: float32 (T, 3, size, size), normalised.
        """
        pixels = normalised(
            torch.from_numpy(apply_operations(frames, self.operations)), mean, std
        )  # (T,3,H,W)
        box = self.box
        cut = pixels[..., box.top : box.top + box.height, box.left : box.left + box.width]
        view = resized(cut, (size, size))
        return view.flip(-1) if self.is_mirrored else view
