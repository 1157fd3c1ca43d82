"""Train evl-tiny: `python -m tools.pretraining.train --out DIR`, which also goes on from where it was stopped.

B pictures, M captions.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tools.pretraining.model import GROUND_HEADS, PATCH_HEADS, PRESENCE_HEADS, Pretraining, contrastive_loss
from tools.pretraining.pictures import (
    ANY,
    COLOUR,
    COLUMN,
    LEVELS,
    ROW,
    SHAPE,
    SIZE,
    TEXTURE,
    Caption,
    Pictures,
    caption_for,
    draw_pictures,
    is_true,
    things_on_patches,
    tokenise,
)
from tools.pretraining.pixels import normalise
from tools.pretraining.weights import save_weights, untrained
from tools.pretraining.zero_shot import zero_shot_accuracy

CAPTIONS_PER_PICTURE = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """One training. `level_starts`: share of the steps after which pictures of each level are drawn."""

    steps: int = 8000
    batch: int = 32
    lr: float = 8e-4
    warmup_steps: int = 300
    weight_decay: float = 0.02
    head_weight: float = 0.2
    patch_weight: float = 0.5
    level_starts: tuple[float, ...] = (0.0, 0.08, 0.14, 0.24)
    side: int = 96
    seed: int = 0


def batch_of(options: Options, step: int) -> tuple[Pictures, list[Caption]]:
    """Pictures and captions of a step, by seed and step alone, so that a stopped training loses nothing."""
    rng = np.random.default_rng([options.seed, step])
    hardest = sum(step >= start * options.steps for start in options.level_starts) - 1
    # Half of them as hard as may be, the others of any level so far.
    levels = np.where(rng.random(options.batch) < 0.5, hardest, rng.integers(0, hardest + 1, options.batch))
    assert hardest < LEVELS
    pictures = draw_pictures(rng, options.batch, side=options.side, levels=levels)
    numbers = itertools.product(range(options.batch), range(CAPTIONS_PER_PICTURE))
    return pictures, [caption_for(rng, pictures, number) for number, _ in numbers]


def presence(pictures: Pictures) -> dict[str, torch.Tensor]:
    """float (B, labels) for each of `PRESENCE_HEADS`: whether a thing like that is in the picture."""
    t = pictures.things
    cell = t[..., ROW] * 3 + t[..., COLUMN]
    single = {
        "shape": t[..., SHAPE],
        "colour": t[..., COLOUR],
        "texture": t[..., TEXTURE],
        "size": t[..., SIZE],
        "cell": cell,
    }
    out = {}
    for name, labels in PRESENCE_HEADS.items():
        number = np.zeros_like(cell)
        for part in name.split(" x "):
            number = number * PRESENCE_HEADS[part] + single[part]
        present = torch.zeros(len(t), labels)
        picture, thing = np.nonzero(t[..., 0] != ANY)
        present[picture, number[picture, thing]] = 1.0
        out[name] = present
    return out


def losses(model: Pretraining, pictures: Pictures, captions: list[Caption]) -> dict[str, torch.Tensor]:
    """The contrastive loss, and those of the attribute heads on the class token and on the patches."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled, patches = model.encode(normalise(pictures.pixels))
        images = model.embed(pooled)
        texts = model.embed_texts(torch.from_numpy(tokenise(captions)))
    pooled, patches = pooled.float(), patches.float()
    own = torch.arange(len(captions)) // CAPTIONS_PER_PICTURE
    logits = model.log_scale.clamp(max=math.log(100.0)).exp() * texts @ images.T
    contrastive = contrastive_loss(logits, own, torch.from_numpy(is_true(captions, pictures)))
    attributes = torch.zeros(())
    for name, target in presence(pictures).items():
        answers = F.binary_cross_entropy_with_logits(model.heads[name](pooled), target, reduction="none")
        attributes = attributes + answers.sum(1).mean()
    for which, name in enumerate(GROUND_HEADS):
        attributes = attributes + F.cross_entropy(
            model.heads[name](pooled), torch.from_numpy(pictures.grounds[:, which])
        )
    return {
        "contrastive": contrastive,
        "attributes": attributes,
        "patches": _patch_loss(model, patches, pictures),
    }


def _patch_loss(model: Pretraining, patches: torch.Tensor, pictures: Pictures) -> torch.Tensor:
    """Cross entropy of what lies over each patch, over patches that something lies over."""
    which = things_on_patches(pictures, grid=math.isqrt(patches.shape[1]))
    picture, patch = np.nonzero(which != ANY)
    values = torch.from_numpy(pictures.things[picture, which[picture, patch]])  # (N, A)
    tokens = patches[torch.from_numpy(picture), torch.from_numpy(patch)]
    columns = {"shape": SHAPE, "colour": COLOUR, "texture": TEXTURE, "size": SIZE}
    loss = torch.zeros(())
    for name in PATCH_HEADS:
        loss = loss + F.cross_entropy(model.patch_heads[name](tokens), values[:, columns[name]])
    return loss


def optimiser_of(model: Pretraining, options: Options) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.98),
    )


def learning_rate(options: Options, step: int) -> float:
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return options.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def train(options: Options, out: Path, *, every: int, held_out: int) -> Iterator[dict[str, Any]]:
    """Train to the end, or on from the last checkpoint; yields what is logged every so many steps."""
    out.mkdir(parents=True, exist_ok=True)
    model = untrained(options.seed)
    optimiser = optimiser_of(model, options)
    last, first_step = out / "last.pt", 0
    if last.exists():
        state = torch.load(last, weights_only=True)
        if state["options"] != json.dumps(asdict(options)):
            raise SystemExit(
                f"{out}: was begun with other options ({state['options']}); expected another --out"
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first_step = state["step"]
    else:
        yield {
            "step": 0,
            "zero_shot": zero_shot_accuracy(model, pictures=held_out, side=options.side, seed=options.seed),
        }
    sums: dict[str, float] = {}
    clock = time.monotonic()
    for step in range(first_step, options.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(options, step)
        parts = losses(model, *batch_of(options, step))
        loss = (
            parts["contrastive"]
            + options.head_weight * parts["attributes"]
            + options.patch_weight * parts["patches"]
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        done = step + 1
        if done % every and done != options.steps:
            continue
        steps = 1 + (done - 1) % every if done - first_step > (done - 1) % every else done - first_step
        line = {name: round(total / steps, 4) for name, total in sums.items()}
        scores = zero_shot_accuracy(model, pictures=held_out, side=options.side, seed=options.seed)
        rate = round(steps * options.batch / (time.monotonic() - clock), 1)
        _save(last, model, optimiser, options, done)
        yield {"step": done, **line, "zero_shot": scores, "pictures_per_s": rate}
        sums, clock = {}, time.monotonic()
    save_weights(model, out / "evl-tiny.safetensors", options=options)


def _save(
    path: Path, model: Pretraining, optimiser: torch.optim.Optimizer, options: Options, step: int
) -> None:
    unfinished = path.with_suffix(".unfinished")
    torch.save(
        {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "options": json.dumps(asdict(options)),
            "step": step,
        },
        unfinished,
    )
    os.replace(unfinished, path)


def main() -> None:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("steps", "batch", "seed", "warmup_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    for name in ("lr", "head_weight", "patch_weight"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    parser.add_argument("--every", type=int, default=250, help="steps between two checkpoints")
    parser.add_argument("--held-out", type=int, default=512, help="pictures the accuracy is measured on")
    parser.add_argument("--threads", type=int, default=1)
    given = vars(parser.parse_args())
    out, every, held_out = given.pop("out"), given.pop("every"), given.pop("held_out")
    torch.set_num_threads(given.pop("threads"))
    for line in train(Options(**given), out, every=every, held_out=held_out):
        text = json.dumps(line)
        print(text, flush=True)
        with (out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(text + "\n")


if __name__ == "__main__":
    main()
