"""Draw *motions*: clips whose class only order and displacement tell, as Something-Something's do.

There are fourteen classes in seven pairs. The two classes of a pair have the same frames in opposite order: a model that
is blind to order guesses between them, and reaches 50 % at most. Every class has things at rest and a panning camera.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from evl_cache.rendered.drawing import Thing
from evl_cache.rendered.films import PALETTES, Film, Props

# A class, and the class of the same clips played backwards.
REVERSED: tuple[tuple[str, str], ...] = (
    ("moving_right", "moving_left"),
    ("moving_down", "moving_up"),
    ("approaching", "receding"),
    ("coming_together", "moving_apart"),
    ("putting_on", "taking_off"),
    ("pushing", "pulling"),
    ("circling_clockwise", "circling_counterclockwise"),
)
CLASSES: tuple[str, ...] = tuple(sorted(name for pair in REVERSED for name in pair))
AGENT = "ring"  # the thing that pushes and pulls


@dataclass(frozen=True, kw_only=True)
class MotionDifficulty:
    """How hard clips are; lengths are fractions of the picture's side.

    Attributes:
        travel: bounds of the moving thing's way from the first frame to the last.
        pan: largest way of the camera.
        radius: bounds of a thing's radius.
        others: largest number of things at rest.
    """

    travel: tuple[float, float]
    pan: float
    radius: tuple[float, float]
    others: int


DIFFICULTIES = {
    "easy": MotionDifficulty(travel=(0.5, 0.62), pan=0.0, radius=(0.11, 0.15), others=0),
    "normal": MotionDifficulty(travel=(0.4, 0.62), pan=0.1, radius=(0.08, 0.13), others=1),
    "hard": MotionDifficulty(travel=(0.25, 0.5), pan=0.2, radius=(0.06, 0.10), others=3),
}

Scene = list[list[Thing]]
Progress = list[float]  # 0 in the first frame, 1 in the last


def motion_film(
    class_name: str, rng: np.random.Generator, *, split: str, difficulty: MotionDifficulty, num_frames: int
) -> Film:
    """Return a clip of one of `CLASSES`; from an equal random stream, the reversed class's clip is it backwards."""
    forward, backward = next(pair for pair in REVERSED if class_name in pair)
    props = Props(rng, PALETTES[split])
    progress = [frame / max(1, num_frames - 1) for frame in range(num_frames)]
    still = [
        props.thing(
            x=props.uniform((0.1, 0.9)), y=props.uniform((0.1, 0.9)), radius=props.uniform(difficulty.radius)
        )
        for _ in range(int(rng.integers(difficulty.others + 1)))
    ]
    moving = _SCENES[forward](props, difficulty, progress)
    film = Film(
        things=tuple((*still, *things) for things in moving),
        pans=props.drift(num_frames, difficulty.pan),
        ground=props.ground(),
    )
    return film.backwards() if class_name == backward else film


def _move(thing: Thing, dx: float, dy: float) -> Thing:
    return replace(thing, x=thing.x + dx, y=thing.y + dy)


def _start(props: Props, radius: float, travel: float) -> float:
    """Return where a path of length `travel` begins, so that it stays in the picture if it can."""
    low, high = radius, 1.0 - radius - travel
    return props.uniform((low, high)) if low < high else 0.5 * (low + high)


def _straight(props: Props, difficulty: MotionDifficulty, progress: Progress, *, across: bool) -> Scene:
    radius, travel = props.uniform(difficulty.radius), props.uniform(difficulty.travel)
    along, beside = _start(props, radius, travel), props.uniform((radius, 1.0 - radius))
    thing = props.thing(x=along if across else beside, y=beside if across else along, radius=radius)
    return [[_move(thing, travel * p, 0.0) if across else _move(thing, 0.0, travel * p)] for p in progress]


def _approaching(props: Props, difficulty: MotionDifficulty, progress: Progress) -> Scene:
    smallest = props.uniform(difficulty.radius) * 0.8
    growth = 1.0 + 3.0 * props.uniform(difficulty.travel)
    thing = props.thing(x=props.uniform((0.3, 0.7)), y=props.uniform((0.3, 0.7)), radius=smallest)
    return [[replace(thing, radius=smallest * growth**p)] for p in progress]


def _coming_together(props: Props, difficulty: MotionDifficulty, progress: Progress) -> Scene:
    first_radius, second_radius = props.uniform(difficulty.radius), props.uniform(difficulty.radius)
    travel, angle = props.uniform(difficulty.travel), props.angle()
    x, y = props.uniform((0.42, 0.58)), props.uniform((0.42, 0.58))
    first, second = props.thing(x=x, y=y, radius=first_radius), props.thing(x=x, y=y, radius=second_radius)
    closest = first_radius + second_radius
    half = [0.5 * (closest + travel * (1.0 - p)) for p in progress]
    return [
        [
            _move(first, -h * math.cos(angle), -h * math.sin(angle)),
            _move(second, h * math.cos(angle), h * math.sin(angle)),
        ]
        for h in half
    ]


def _putting_on(props: Props, difficulty: MotionDifficulty, progress: Progress) -> Scene:
    radius, travel = props.uniform(difficulty.radius), props.uniform(difficulty.travel)
    angle = props.uniform((-1.0, 1.0)) - 0.5 * math.pi  # from somewhere above
    dx, dy = travel * math.cos(angle), travel * math.sin(angle)
    x, y = props.uniform((0.35, 0.65)), props.uniform((0.6, 0.8))
    base = props.thing(x=x, y=y, radius=1.5 * radius)
    put = props.thing(x=x, y=y - 0.6 * radius, radius=0.9 * radius)
    return [[base, _move(put, dx * (1.0 - p), dy * (1.0 - p))] for p in progress]


def _pushing(props: Props, difficulty: MotionDifficulty, progress: Progress) -> Scene:
    agent_radius, pushed_radius = props.uniform(difficulty.radius), props.uniform(difficulty.radius)
    travel, angle = props.uniform(difficulty.travel), props.angle()
    cos, sin = math.cos(angle), math.sin(angle)
    middle_x, middle_y = props.uniform((0.45, 0.55)), props.uniform((0.45, 0.55))
    half = 0.5 * (agent_radius + pushed_radius)
    agent = props.thing(x=middle_x - half * cos, y=middle_y - half * sin, radius=agent_radius, shape=AGENT)
    pushed = props.thing(x=middle_x + half * cos, y=middle_y + half * sin, radius=pushed_radius)
    return [
        [_move(thing, travel * (p - 0.5) * cos, travel * (p - 0.5) * sin) for thing in (pushed, agent)]
        for p in progress
    ]


def _circling(props: Props, difficulty: MotionDifficulty, progress: Progress) -> Scene:
    radius, orbit, start = props.uniform(difficulty.radius), props.uniform((0.16, 0.22)), props.angle()
    sweep = 1.6 * props.uniform(difficulty.travel) / orbit
    x, y = props.uniform((0.4, 0.6)), props.uniform((0.4, 0.6))
    thing = props.thing(x=x, y=y, radius=radius)
    # y points down, so growing angles run clockwise on the screen.
    angles = [start + sweep * p for p in progress]
    return [[_move(thing, orbit * math.cos(a), orbit * math.sin(a))] for a in angles]


_SCENES: dict[str, Callable[[Props, MotionDifficulty, Progress], Scene]] = {
    "moving_right": lambda props, difficulty, progress: _straight(props, difficulty, progress, across=True),
    "moving_down": lambda props, difficulty, progress: _straight(props, difficulty, progress, across=False),
    "approaching": _approaching,
    "coming_together": _coming_together,
    "putting_on": _putting_on,
    "pushing": _pushing,
    "circling_clockwise": _circling,
}
