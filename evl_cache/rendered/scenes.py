"""Draw *scenes*: clips whose class their appearance tells, as in Kinetics-400.

A class is a pair of shapes that are in the picture together. Every shape is in three classes, so that no single thing
tells one. Colours, textures, sizes, places, grounds, other things, order and the camera's slow pan tell nothing: things
stay at rest.
"""

from dataclasses import dataclass

import numpy as np

from evl_cache.rendered.films import PALETTES, Film, Props

# Each of the eight shapes occurs three times.
PAIRS: tuple[tuple[str, str], ...] = (
    ("circle", "square"),
    ("triangle", "diamond"),
    ("cross", "ring"),
    ("star", "bar"),
    ("circle", "triangle"),
    ("square", "cross"),
    ("diamond", "star"),
    ("ring", "bar"),
    ("circle", "star"),
    ("square", "ring"),
    ("triangle", "bar"),
    ("diamond", "cross"),
)
CLASSES: tuple[str, ...] = tuple(sorted(f"{first}_and_{second}" for first, second in PAIRS))
_CELLS = tuple((x, y) for y in (0.2, 0.5, 0.8) for x in (0.2, 0.5, 0.8))
_WITHIN_CELL = 0.07


@dataclass(frozen=True, kw_only=True)
class SceneDifficulty:
    """How hard clips are; lengths are fractions of the picture's side.

    Attributes:
        radius: bounds of a thing's radius.
        others: largest number of further things.
        pan: largest way of the camera.
    """

    radius: tuple[float, float]
    others: int
    pan: float


DIFFICULTIES = {
    "easy": SceneDifficulty(radius=(0.12, 0.17), others=0, pan=0.04),
    "normal": SceneDifficulty(radius=(0.08, 0.14), others=1, pan=0.08),
    "hard": SceneDifficulty(radius=(0.06, 0.10), others=3, pan=0.12),
}


def scene_film(
    class_name: str, rng: np.random.Generator, *, split: str, difficulty: SceneDifficulty, num_frames: int
) -> Film:
    """Return a clip of one of `CLASSES`."""
    pair = next(pair for pair in PAIRS if "_and_".join(pair) == class_name)
    props = Props(rng, PALETTES[split])
    shapes = list(pair)
    for _ in range(int(rng.integers(difficulty.others + 1))):
        more = _harmless(shapes)
        if more:
            shapes.append(more[int(rng.integers(len(more)))])
    things = []
    for shape, cell in zip(shapes, rng.permutation(len(_CELLS)), strict=False):
        x, y = (c + props.uniform((-_WITHIN_CELL, _WITHIN_CELL)) for c in _CELLS[cell])
        things.append(props.thing(x=x, y=y, radius=props.uniform(difficulty.radius), shape=shape))
    return Film(
        things=(tuple(things),) * num_frames,
        pans=props.drift(num_frames, difficulty.pan),
        ground=props.ground(),
    )


def _harmless(shapes: list[str]) -> list[str]:
    """Return the shapes that form no class's pair with any of `shapes`."""
    every = sorted({shape for pair in PAIRS for shape in pair})
    pairs = {frozenset(pair) for pair in PAIRS}
    return [shape for shape in every if all(frozenset((shape, there)) not in pairs for there in shapes)]
