"""Draw pictures of simple things on a ground, as all rendered benchmarks do.

H and W pixels (H = W = side). Places and lengths are fractions of the picture's side, x to the right, y down.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Picture = npt.NDArray[np.uint8]
Colour = tuple[float, float, float]

COLOURS: Mapping[str, Colour] = {
    "red": (220, 40, 40),
    "green": (50, 180, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 55),
    "purple": (165, 55, 205),
    "cyan": (60, 210, 215),
    "orange": (245, 140, 30),
    "white": (242, 242, 242),
}
GROUND_COLOURS: Mapping[str, Colour] = {
    "grey": (125, 125, 125),
    "black": (15, 15, 15),
    "brown": (105, 70, 45),
    "navy": (25, 35, 85),
    "olive": (95, 100, 45),
    "pink": (225, 170, 180),
}
TEXTURES = ("plain", "striped", "checked", "dotted")
GROUND_PATTERNS = ("plain", "shaded", "striped", "checked", "speckled")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object.

    Attributes:
        shape: one of `SHAPES`.
        colour: RGB in 0 .. 255.
        texture: one of `TEXTURES`.
        x: of its centre.
        y: of its centre.
        radius: of a circle of about its area.
        angle: in radians, clockwise on the screen.
        phase: shift of the texture, 0 .. 1.
    """

    shape: str
    colour: Colour
    texture: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What is behind the things.

    Attributes:
        colour: RGB in 0 .. 255.
        pattern: one of `GROUND_PATTERNS`.
        angle: of stripes, checks or shading, in radians.
        phase: shift of stripes or checks, in periods.
        period: of stripes or checks.
        seed: of speckles.
    """

    colour: Colour
    pattern: str
    angle: float = 0.0
    phase: float = 0.0
    period: float = 0.3
    seed: int = 0


def draw(
    things: Sequence[Thing], ground: Ground, *, side: int, pan: tuple[float, float] = (0.0, 0.0)
) -> Picture:
    """Return a picture, uint8 (side, side, 3), RGB; later things hide earlier ones, and `pan` moves the camera."""
    picture = _ground(ground, side, pan)
    for thing in things:
        _paint(picture, thing, side, pan)
    return np.rint(picture).astype(np.uint8)


def _ground(ground: Ground, side: int, pan: tuple[float, float]) -> Floats:
    base = np.asarray(ground.colour, np.float32)
    x = ((np.arange(side, dtype=np.float32) + 0.5) / side + np.float32(pan[0]))[None, :]
    y = ((np.arange(side, dtype=np.float32) + 0.5) / side + np.float32(pan[1]))[:, None]
    if ground.pattern == "plain":
        return np.broadcast_to(base, (side, side, 3)).copy()
    cos, sin = np.float32(math.cos(ground.angle)), np.float32(math.sin(ground.angle))
    along, across = x * cos + y * sin, y * cos - x * sin
    if ground.pattern == "shaded":
        level: Floats = along - 0.5 * (cos + sin)  # -0.7 .. 0.7
    elif ground.pattern == "striped":
        level = 0.5 * _square_wave(along / ground.period + ground.phase, side * ground.period)
    elif ground.pattern == "checked":
        first = _square_wave(along / ground.period + ground.phase, side * ground.period)
        level = 0.5 * first * _square_wave(across / ground.period, side * ground.period)
    else:
        level = _speckles(ground.seed, side, pan)
    picture: Floats = np.clip(base + np.float32(45.0) * level[..., None], 0.0, 255.0)
    return picture


def _square_wave(cycles: Floats, pixels: float) -> Floats:
    """Return a wave of -1 and 1 with edges about a pixel wide; `cycles` counts periods of `pixels` pixels."""
    distance = 0.25 - np.abs(cycles % 1.0 - 0.5)  # of a period, to the nearest edge
    wave: Floats = np.clip(2.0 * distance * np.float32(pixels), -1.0, 1.0)
    return wave


def _speckles(seed: int, side: int, pan: tuple[float, float]) -> Floats:
    """Return soft blots a sixteenth of the side wide; they stay in place when the camera pans, and wrap around."""
    field = np.random.default_rng(seed).uniform(-1.0, 1.0, size=(16, 16)).astype(np.float32)

    def weights(shift: float) -> tuple[npt.NDArray[np.int64], Floats]:
        at = (np.arange(side) + 0.5) / side * 16 + shift * 16
        cell = np.floor(at).astype(np.int64)
        return cell % 16, (at - cell).astype(np.float32)

    (column, right), (row, down) = weights(pan[0]), weights(pan[1])
    upper = field[row][:, column] * (1 - right) + field[row][:, (column + 1) % 16] * right
    lower = (
        field[(row + 1) % 16][:, column] * (1 - right) + field[(row + 1) % 16][:, (column + 1) % 16] * right
    )
    out: Floats = upper * (1 - down[:, None]) + lower * down[:, None]
    return out


def _paint(picture: Floats, thing: Thing, side: int, pan: tuple[float, float]) -> None:
    """Draw a thing onto `picture`, within the area that it may cover."""
    centre_x, centre_y, radius = (thing.x - pan[0]) * side, (thing.y - pan[1]) * side, thing.radius * side
    reach = _REACH * radius + 1.0
    left, right = max(0, int(centre_x - reach)), min(side, int(centre_x + reach) + 2)
    top, bottom = max(0, int(centre_y - reach)), min(side, int(centre_y + reach) + 2)
    if left >= right or top >= bottom:
        return
    x = ((np.arange(left, right, dtype=np.float32) + 0.5 - centre_x) / radius)[None, :]
    y = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - centre_y) / radius)[:, None]
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    u, v = x * cos + y * sin, y * cos - x * sin
    cover = np.clip(0.5 - SHAPES[thing.shape](u, v) * radius, 0.0, 1.0)[..., None]
    colour = np.asarray(thing.colour, np.float32)
    if thing.texture != "plain":
        colour = colour * (1.0 - 0.65 * _texture(thing, u, v, radius))[..., None]
    area = picture[top:bottom, left:right]
    area += cover * (colour - area)


def _texture(thing: Thing, u: Floats, v: Floats, radius: float) -> Floats:
    """Return how much the texture darkens each pixel, 0 .. 1."""
    period = 0.75  # radii
    if thing.texture == "striped":
        return 0.5 + 0.5 * _square_wave(u / period + thing.phase + 0.0 * v, radius * period)
    if thing.texture == "checked":
        columns = _square_wave(u / period + thing.phase, radius * period)
        return 0.5 + 0.5 * columns * _square_wave(v / period, radius * period)
    near_u, near_v = (u / period + thing.phase) % 1.0 - 0.5, (v / period) % 1.0 - 0.5
    dots: Floats = np.clip(0.5 + (0.3 - np.hypot(near_u, near_v)) * radius * period, 0.0, 1.0)
    return dots


def _polygon_star(u: Floats, v: Floats) -> Floats:
    turn = (np.arctan2(u, -v) / (2.0 * math.pi) * 5.0) % 1.0
    tip = 2.0 * np.abs(turn - 0.5)  # 1 at a tip, 0 between two
    return (np.hypot(u, v) - (0.62 + 0.93 * tip**1.5)) * 0.6


# Distances to each shape's outline in radii, below 0 inside; all shapes have about the area of the unit circle.
SHAPES: Mapping[str, Callable[[Floats, Floats], Floats]] = {
    "circle": lambda u, v: np.hypot(u, v) - 1.0,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.886,
    "triangle": lambda u, v: np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.778,
    "diamond": lambda u, v: (np.abs(u) / 0.9 + np.abs(v) / 1.75 - 1.0) * 0.8,
    "cross": lambda u, v: np.minimum(
        np.maximum(np.abs(u) - 1.3, np.abs(v) - 0.38), np.maximum(np.abs(u) - 0.38, np.abs(v) - 1.3)
    ),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.95) - 0.27,
    "star": _polygon_star,
    "bar": lambda u, v: np.maximum(np.abs(u) - 1.6, np.abs(v) - 0.48),
}
_REACH = 1.8  # radii; the farthest point of any shape
