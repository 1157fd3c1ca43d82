"""Captioned pictures: drawn by seed, described in words, and known so exactly that every caption is true or false.

B pictures, O things at most in each, A attributes of a thing, M captions.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evl_cache.rendered.drawing import (
    COLOURS,
    GROUND_COLOURS,
    GROUND_PATTERNS,
    SHAPES,
    TEXTURES,
    Ground,
    Picture,
    Thing,
    draw,
)

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

SIZES = {"small": 0.085, "medium": 0.14, "large": 0.21}  # radius, of the picture's side
COLUMNS, ROWS = ("left", "centre", "right"), ("top", "middle", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
ATTRIBUTES: tuple[tuple[str, ...], ...] = (
    tuple(SHAPES),
    tuple(COLOURS),
    TEXTURES,
    tuple(SIZES),
    COLUMNS,
    ROWS,
)
SHAPE, COLOUR, TEXTURE, SIZE, COLUMN, ROW = range(6)
GROUND_ATTRIBUTES: tuple[tuple[str, ...], ...] = (tuple(GROUND_COLOURS), GROUND_PATTERNS)
MOST_THINGS = 3
LEVELS = 4  # one plain thing on plain ground; textures; patterned grounds; several things
ANY = -1

_CELL_CENTRES = np.array([0.2, 0.5, 0.8])
_WITHIN_CELL = 0.085
_APART = 0.15  # of the side, for one thing to be left of another


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A batch of pictures and what they show.

    Attributes:
        pixels: uint8 (B, side, side, 3).
        things: int64 (B, O, A), numbers into `ATTRIBUTES`; `ANY` where there is no further thing.
        places: float64 (B, O, 2), x and y. grounds: int64 (B, 2), numbers into `GROUND_ATTRIBUTES`.
    """

    pixels: npt.NDArray[np.uint8]
    things: Integers
    places: npt.NDArray[np.float64]
    grounds: Integers


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What a caption claims: `ANY` where it says nothing.

    Attributes:
        first: of one thing, A numbers. relation: of `RELATIONS`, to another thing that is as `second` says.
        ground: two numbers.
    """

    first: tuple[int, ...]
    relation: int = ANY
    second: tuple[int, ...] = (ANY,) * 6
    ground: tuple[int, int] = (ANY, ANY)

    def words(self) -> list[str]:
        words = ["a", *_noun(self.first)]
        if self.first[ROW] != ANY:
            words += ["at", "the", ROWS[self.first[ROW]], COLUMNS[self.first[COLUMN]]]
        if self.relation != ANY:
            words += [*RELATIONS[self.relation].split(), "a", *_noun(self.second)]
        if self.ground != (ANY, ANY):
            words += ["on", "a"]
            words += [GROUND_ATTRIBUTES[k][n] for k, n in reversed(list(enumerate(self.ground))) if n != ANY]
            words.append("ground")
        return words


def _noun(values: tuple[int, ...]) -> list[str]:
    words = [ATTRIBUTES[k][values[k]] for k in (SIZE, TEXTURE, COLOUR) if values[k] != ANY]
    return [*words, "thing" if values[SHAPE] == ANY else ATTRIBUTES[SHAPE][values[SHAPE]]]


_PUNCTUATION = ["", "a", "at", "the", "on", "ground", "thing", "of"]
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        _PUNCTUATION
        + [word for values in (*ATTRIBUTES, *GROUND_ATTRIBUTES) for word in values]
        + [word for relation in RELATIONS for word in relation.split()]
    )
)
LONGEST_CAPTION = 24
_NUMBER_OF = {word: number for number, word in enumerate(VOCABULARY)}


def tokenise(captions: list[Caption]) -> Integers:
    """int64 (M, LONGEST_CAPTION): numbers of words, 0 behind the last."""
    out = np.zeros((len(captions), LONGEST_CAPTION), np.int64)
    for row, caption in zip(out, captions, strict=True):
        numbers = [_NUMBER_OF[word] for word in caption.words()]
        row[: len(numbers)] = numbers
    return out


def draw_pictures(
    rng: np.random.Generator, count: int, *, side: int, levels: Integers | int, things: int | None = None
) -> Pictures:
    """Draw `count` pictures.

    Args:
        levels: how hard each is, 0 to LEVELS - 1. things: how many, or by level.
    """
    levels = np.broadcast_to(levels, count)
    pixels = np.empty((count, side, side, 3), np.uint8)
    attributes = np.full((count, MOST_THINGS, 6), ANY)
    places = np.zeros((count, MOST_THINGS, 2))
    grounds = np.zeros((count, 2), np.int64)
    for number, level in enumerate(levels):
        how_many = things or (int(rng.integers(1, MOST_THINGS + 1)) if level >= 3 else 1)
        cells = rng.permutation(9)[:how_many]
        for thing, cell in enumerate(cells):
            attributes[number, thing] = (
                rng.integers(len(SHAPES)),
                rng.integers(len(COLOURS)),
                rng.integers(len(TEXTURES)) if level >= 1 and rng.random() < 0.6 else 0,
                rng.integers(len(SIZES)) if how_many == 1 else rng.integers(2),
                cell % 3,
                cell // 3,
            )
            at = _CELL_CENTRES[[cell % 3, cell // 3]]
            places[number, thing] = at + rng.uniform(-_WITHIN_CELL, _WITHIN_CELL, size=2)
        pattern = int(rng.integers(len(GROUND_PATTERNS))) if level >= 2 and rng.random() < 0.7 else 0
        grounds[number] = rng.integers(len(GROUND_COLOURS)), pattern
        pixels[number] = _draw_one(rng, attributes[number, :how_many], places[number], grounds[number], side)
    return Pictures(pixels=pixels, things=attributes, places=places, grounds=grounds)


def _draw_one(
    rng: np.random.Generator,
    attributes: Integers,
    places: npt.NDArray[np.float64],
    ground: Integers,
    side: int,
) -> Picture:
    def shade(colour: tuple[float, float, float]) -> tuple[float, float, float]:
        r, g, b = np.clip(np.asarray(colour) + rng.uniform(-14, 14, size=3), 0, 255)
        return float(r), float(g), float(b)

    radii = list(SIZES.values())
    things = [
        Thing(
            shape=ATTRIBUTES[SHAPE][values[SHAPE]],
            colour=shade(COLOURS[ATTRIBUTES[COLOUR][values[COLOUR]]]),
            texture=TEXTURES[values[TEXTURE]],
            x=float(place[0]),
            y=float(place[1]),
            radius=radii[values[SIZE]] * float(rng.uniform(0.9, 1.1)),
            angle=float(rng.uniform(-0.2, 0.2)),
            phase=float(rng.uniform()),
        )
        for values, place in zip(attributes, places, strict=False)
    ]
    behind = Ground(
        colour=shade(GROUND_COLOURS[GROUND_ATTRIBUTES[0][ground[0]]]),
        pattern=GROUND_PATTERNS[ground[1]],
        angle=float(rng.uniform(0, 2 * math.pi)),
        phase=float(rng.uniform()),
        period=float(rng.uniform(0.18, 0.4)),
        seed=int(rng.integers(2**31)),
    )
    return draw(things, behind, side=side)


def caption_for(rng: np.random.Generator, pictures: Pictures, number: int) -> Caption:
    """A true caption that leaves much out: often the colour, which is the easiest way to tell pictures apart."""
    present = np.flatnonzero(pictures.things[number, :, 0] != ANY)
    chosen = int(rng.choice(present))
    values = pictures.things[number, chosen]
    says = rng.random(4) < (0.7, 0.35, 0.35, 0.25)
    first = [int(v) if told else ANY for v, told in zip(values[:4], says, strict=True)] + [ANY, ANY]
    relation, second = ANY, (ANY,) * 6
    kind = rng.random()
    if len(present) > 1 and kind < 0.5:
        other = int(rng.choice(present[present != chosen]))
        holding = np.flatnonzero(_relations(pictures.places)[number, chosen, other])
        if len(holding):
            relation = int(rng.choice(holding))
            seen = pictures.things[number, other]
            by_shape = rng.random() < 0.75
            second = (
                int(seen[SHAPE]) if by_shape else ANY,
                int(seen[COLOUR]) if not by_shape or rng.random() < 0.3 else ANY,
                *(ANY,) * 4,
            )
    elif kind < 0.75:
        first[COLUMN:] = [int(values[COLUMN]), int(values[ROW])]
    ground = (ANY, ANY)
    if rng.random() < 0.3:
        colour, pattern = (int(v) for v in pictures.grounds[number])
        ground = ((colour, ANY), (ANY, pattern), (colour, pattern))[int(rng.integers(3))]
    return Caption(first=tuple(first), relation=relation, second=second, ground=ground)


def is_true(captions: list[Caption], pictures: Pictures) -> Flags:
    """Which captions are true of which pictures, (M, B)."""
    first = _fits(np.array([c.first for c in captions]), pictures.things)  # (M,B,O)
    second = _fits(np.array([c.second for c in captions]), pictures.things)
    relation = np.array([c.relation for c in captions])
    holds = np.moveaxis(_relations(pictures.places), -1, 0)[relation]  # (M,B,O,O)
    different = ~np.eye(MOST_THINGS, dtype=bool)
    related = (first[..., :, None] & second[..., None, :] & holds & different).any(axis=(-2, -1))
    shown = np.where(relation[:, None] == ANY, first.any(axis=-1), related)
    ground = np.array([c.ground for c in captions])[:, None]
    out: Flags = shown & ((ground == ANY) | (ground == pictures.grounds)).all(axis=-1)
    return out


def things_on_patches(pictures: Pictures, *, grid: int) -> Integers:
    """Which thing lies over each patch, (B, grid * grid): the nearest that reaches into it, or `ANY`."""
    low = np.arange(grid) / grid
    centres = pictures.places[..., None]  # (B,O,2,1)
    beyond = centres - np.clip(centres, low, low + 1.0 / grid)  # of the patch's near edge, (B,O,2,grid)
    distance = np.hypot(beyond[:, :, 0, None, :], beyond[:, :, 1, :, None])  # (B,O,row,column)
    radius = np.array(list(SIZES.values()))[pictures.things[..., SIZE]]
    distance -= 0.8 * radius[..., None, None]
    distance[pictures.things[..., SHAPE] == ANY] = np.inf
    nearest = np.where(distance.min(axis=1) < 0.0, distance.argmin(axis=1), ANY)
    return nearest.reshape(len(nearest), -1)


def _fits(wanted: Integers, things: Integers) -> Flags:
    """(M, A) against (B, O, A): which thing is as a caption says, (M, B, O)."""
    wanted = wanted[:, None, None]
    out: Flags = ((wanted == ANY) | (wanted == things)).all(axis=-1) & (things[..., 0] != ANY)
    return out


def _relations(places: npt.NDArray[np.float64]) -> Flags:
    """(B, O, O, 4): whether the first thing is left of, right of, above, below the second."""
    dx = places[:, :, None, 0] - places[:, None, :, 0]
    dy = places[:, :, None, 1] - places[:, None, :, 1]
    sideways = np.abs(dx) > np.abs(dy)
    return np.stack(
        [
            (dx < -_APART) & sideways,
            (dx > _APART) & sideways,
            (dy < -_APART) & ~sideways,
            (dy > _APART) & ~sideways,
        ],
        axis=-1,
    )
