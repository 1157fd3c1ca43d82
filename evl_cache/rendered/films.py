"""Clips described frame by frame before they are drawn, and what their parts are chosen from.

T frames, H and W pixels (H = W = side).
"""

import math
from collections.abc import Sequence
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
        things: of each frame, the farthest first. pans: where the camera looks in each, of the side.
    """

    things: tuple[tuple[Thing, ...], ...]
    pans: tuple[tuple[float, float], ...]
    ground: Ground

    def backwards(self) -> "Film":
        return replace(self, things=self.things[::-1], pans=self.pans[::-1])

    def frames(self, side: int) -> Frames:
        """uint8 (T, side, side, 3), RGB."""
        shots = zip(self.things, self.pans, strict=True)
        return np.stack([draw(things, self.ground, side=side, pan=pan) for things, pan in shots])


@dataclass(frozen=True, kw_only=True)
class Palette:
    """What the clips of a split are made of."""

    colours: Sequence[str]
    textures: Sequence[str]
    ground_colours: Sequence[str]
    ground_patterns: Sequence[str]


# No clip of validation has a colour, and few a ground, that training has shown.
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
    """Draws the parts of one clip from its palette and its own random stream."""

    def __init__(self, rng: np.random.Generator, palette: Palette) -> None:
        self.rng, self._palette = rng, palette

    def uniform(self, bounds: tuple[float, float]) -> float:
        return float(self.rng.uniform(*bounds))

    def angle(self) -> float:
        return self.uniform((0.0, 2.0 * math.pi))

    def colour(self, table: Sequence[str], values: dict[str, Colour]) -> Colour:
        base = values[table[int(self.rng.integers(len(table)))]]
        r, g, b = np.clip(np.asarray(base) + self.rng.uniform(-14, 14, size=3), 0, 255)
        return float(r), float(g), float(b)

    def thing(self, *, x: float, y: float, radius: float, shape: str | None = None) -> Thing:
        """A thing at a place, of any shape but the one kept for agents unless one is given."""
        shapes = tuple(SHAPES)
        return Thing(
            shape=shape or shapes[int(self.rng.integers(len(shapes)))],
            colour=self.colour(self._palette.colours, dict(COLOURS)),
            texture=self._palette.textures[int(self.rng.integers(len(self._palette.textures)))],
            x=x,
            y=y,
            radius=radius,
            angle=self.uniform((-0.2, 0.2)),
            phase=self.uniform((0.0, 1.0)),
        )

    def ground(self) -> Ground:
        patterns = self._palette.ground_patterns
        return Ground(
            colour=self.colour(self._palette.ground_colours, dict(GROUND_COLOURS)),
            pattern=patterns[int(self.rng.integers(len(patterns)))],
            angle=self.angle(),
            phase=self.uniform((0.0, 1.0)),
            period=self.uniform((0.2, 0.4)),
            seed=int(self.rng.integers(2**31)),
        )

    def drift(self, num_frames: int, total: float) -> tuple[tuple[float, float], ...]:
        """A camera that pans evenly in some direction, by at most `total` of the side in the whole clip."""
        angle, length = self.angle(), total * self.uniform((0.0, 1.0))
        steps = [length * (frame / max(1, num_frames - 1) - 0.5) for frame in range(num_frames)]
        return tuple((step * math.cos(angle), step * math.sin(angle)) for step in steps)
