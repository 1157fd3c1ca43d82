"""Describe clips frame by frame before they are drawn, and choose their parts at random.

T frames, H and W pixels (H = W = side).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evl_cache.rendered.drawing import (
    COLOURS,
    GROUND_COLOURS,
    GROUND_PATTERNS,
    SHAPES,
    TEXTURES,
    Colour,
    Ground,
    Thing,
    draw,
)
from evl_cache.rendered.files import Frames


@dataclass(frozen=True, kw_only=True)
class Film:
    """A clip before it is drawn.

    Attributes:
        things: the things of each frame, the farthest first.
        pans: the camera's place in each frame, in sides.
        ground: what is behind the things.
    """

    things: tuple[tuple[Thing, ...], ...]
    pans: tuple[tuple[float, float], ...]
    ground: Ground

    def backwards(self) -> "Film":
        """Return the clip played backwards."""
        return replace(self, things=self.things[::-1], pans=self.pans[::-1])

    def frames(self, side: int) -> Frames:
        """Return the frames, uint8 (T, side, side, 3), RGB."""
        shots = zip(self.things, self.pans, strict=True)
        return np.stack([draw(things, self.ground, side=side, pan=pan) for things, pan in shots])


@dataclass(frozen=True, kw_only=True)
class Palette:
    """The names from which clips of a split are made."""

    colours: Sequence[str]
    textures: Sequence[str]
    ground_colours: Sequence[str]
    ground_patterns: Sequence[str]


# Validation has no colour of training's things, and few of its grounds.
PALETTES = {
    "train": Palette(
        colours=("red", "green", "blue", "yellow", "purple"),
        textures=("plain", "striped"),
        ground_colours=("grey", "black", "brown", "navy"),
        ground_patterns=("plain", "shaded", "striped", "speckled"),
    ),
    "val": Palette(
        colours=("cyan", "orange", "white"),
        textures=("plain", "dotted"),
        ground_colours=("olive", "pink", "black"),
        ground_patterns=("plain", "shaded", "checked", "speckled"),
    ),
}
assert all(set(p.colours) <= set(COLOURS) and set(p.textures) <= set(TEXTURES) for p in PALETTES.values())
assert all(set(p.ground_patterns) <= set(GROUND_PATTERNS) for p in PALETTES.values())


class Props:
    """Choose the parts of one clip from its palette, by its own random stream."""

    def __init__(self, rng: np.random.Generator, palette: Palette) -> None:
        self.rng, self._palette = rng, palette

    def uniform(self, bounds: tuple[float, float]) -> float:
        """Return a random number between two bounds."""
        return float(self.rng.uniform(*bounds))

    def angle(self) -> float:
        """Return a random angle in radians."""
        return self.uniform((0.0, 2.0 * math.pi))

    def colour(self, table: Sequence[str], values: Mapping[str, Colour]) -> Colour:
        """Return a colour near a random one of `table`, whose RGB are in `values`."""
        base = values[table[int(self.rng.integers(len(table)))]]
        r, g, b = np.clip(np.asarray(base) + self.rng.uniform(-14, 14, size=3), 0, 255)
        return float(r), float(g), float(b)

    def thing(self, *, x: float, y: float, radius: float, shape: str | None = None) -> Thing:
        """Return a thing at a place, of a random shape unless one is given."""
        shapes = tuple(SHAPES)
        return Thing(
            shape=shape or shapes[int(self.rng.integers(len(shapes)))],
            colour=self.colour(self._palette.colours, COLOURS),
            texture=self._palette.textures[int(self.rng.integers(len(self._palette.textures)))],
            x=x,
            y=y,
            radius=radius,
            angle=self.uniform((-0.2, 0.2)),
            phase=self.uniform((0.0, 1.0)),
        )

    def ground(self) -> Ground:
        """Return a random ground."""
        patterns = self._palette.ground_patterns
        return Ground(
            colour=self.colour(self._palette.ground_colours, GROUND_COLOURS),
            pattern=patterns[int(self.rng.integers(len(patterns)))],
            angle=self.angle(),
            phase=self.uniform((0.0, 1.0)),
            period=self.uniform((0.2, 0.4)),
            seed=int(self.rng.integers(2**31)),
        )

    def drift(self, num_frames: int, total: float) -> tuple[tuple[float, float], ...]:
        """Return the pans of a camera that moves evenly in a random direction, by at most `total` of the side."""
        angle, length = self.angle(), total * self.uniform((0.0, 1.0))
        steps = [length * (frame / max(1, num_frames - 1) - 0.5) for frame in range(num_frames)]
        return tuple((step * math.cos(angle), step * math.sin(angle)) for step in steps)
