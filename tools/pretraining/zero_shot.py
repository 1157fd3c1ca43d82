"""Zero-shot accuracy on held-out pictures, by attribute: `python -m tools.pretraining.zero_shot`, of the shipped weights."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tools.pretraining.model import Pretraining
from tools.pretraining.pictures import (
    ANY,
    ATTRIBUTES,
    COLOUR,
    COLUMN,
    GROUND_ATTRIBUTES,
    RELATIONS,
    ROW,
    SHAPE,
    SIZE,
    TEXTURE,
    Caption,
    Integers,
    Pictures,
    draw_pictures,
    is_true,
    tokenise,
)
from tools.pretraining.pixels import normalise
from tools.pretraining.weights import load_weights, shipped, untrained

HELD_OUT = 1_000_003  # random streams that training, which counts its steps, never reaches


def _thing(**values: int) -> tuple[int, ...]:
    order = ("shape", "colour", "texture", "size", "column", "row")
    return tuple(values.get(name, ANY) for name in order)


def _questions() -> Iterator[tuple[str, list[Caption]]]:
    """Captions among which one is true of a picture of one thing, by attribute."""
    for name, which in (("shape", SHAPE), ("colour", COLOUR), ("texture", TEXTURE), ("size", SIZE)):
        yield name, [Caption(first=_thing(**{name: n})) for n in range(len(ATTRIBUTES[which]))]
    cells = [
        (column, row) for row in range(len(ATTRIBUTES[ROW])) for column in range(len(ATTRIBUTES[COLUMN]))
    ]
    yield "position", [Caption(first=_thing(column=column, row=row)) for column, row in cells]
    for which, name in enumerate(("ground colour", "ground pattern")):
        yield (
            name,
            [
                Caption(first=_thing(), ground=(n, ANY) if which == 0 else (ANY, n))
                for n in range(len(GROUND_ATTRIBUTES[which]))
            ],
        )


@torch.no_grad()
def zero_shot_accuracy(
    model: Pretraining, *, pictures: int, side: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Attribute -> (accuracy, chance), in percent; one thing, textured, on any ground; relations: two things."""
    rng = np.random.default_rng([seed, HELD_OUT])
    model.eval()
    single = draw_pictures(rng, pictures, side=side, levels=2)
    images = _embed(model, single)
    out = {}
    for name, captions in _questions():
        right = _answers(model, images, captions, is_true(captions, single))
        out[name] = (100.0 * float(right.mean()), 100.0 / len(captions))
    several = draw_pictures(rng, pictures, side=side, levels=3, things=2)
    out["relation"] = (100.0 * _relations_right(model, several), 100.0 / len(RELATIONS))
    model.train()
    return out


def _embed(model: Pretraining, pictures: Pictures) -> torch.Tensor:
    parts = np.array_split(pictures.pixels, 8)
    return torch.cat([model.embed(model.encode(normalise(part))[0]) for part in parts])


def _answers(
    model: Pretraining, images: torch.Tensor, captions: list[Caption], true: np.ndarray
) -> np.ndarray:
    chosen = (images @ model.embed_texts(torch.from_numpy(tokenise(captions))).T).argmax(1).numpy()
    out: np.ndarray = true[chosen, np.arange(len(images))]
    return out


def _relations_right(model: Pretraining, pictures: Pictures) -> float:
    """'a circle left of a star', or right of, above, below: of pictures whose two shapes differ and are apart."""
    images = _embed(model, pictures)
    shapes: Integers = pictures.things[:, :2, SHAPE]
    right = []
    for number in np.flatnonzero(shapes[:, 0] != shapes[:, 1]):
        first, second = (int(n) for n in shapes[number])
        captions = [
            Caption(first=_thing(shape=first), relation=r, second=_thing(shape=second))
            for r in range(len(RELATIONS))
        ]
        true = is_true(captions, pictures)[:, number]
        if true.sum() == 1:
            right.append(bool(_answers(model, images[number : number + 1], captions, true[:, None])[0]))
    return float(np.mean(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=Path, default=shipped(), help="of tools.pretraining.train [the shipped ones]"
    )
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the training; other pictures than it measured"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {"trained": load_weights(arguments.weights), "untrained": untrained(arguments.seed)}
    scores = {
        name: zero_shot_accuracy(model, pictures=arguments.pictures, side=96, seed=arguments.seed + 1)
        for name, model in models.items()
    }
    for attribute, (accuracy, chance) in scores["trained"].items():
        before = scores["untrained"][attribute][0]
        print(f"{attribute:15} {accuracy:5.1f} %, untrained {before:5.1f} %, chance {chance:5.1f} %")
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
