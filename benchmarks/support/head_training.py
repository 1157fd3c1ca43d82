"""Heads trained on features that lie in memory, for the rate-distortion study.

S clips, T frames, N tokens, P patches, C channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evl_cache.heads import Head, build_head


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Features of all clips, shallow to deep: `tokens` a (S, T, N, C) a layer, `maps` a (S, 2, T-1, P, P) or None."""

    tokens: list[Tensor]
    maps: list[Tensor] | None
    labels: Tensor
    grid: tuple[int, int]

    def part(self, rows: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
        """A head's arguments for some clips."""
        maps = None if self.maps is None else [value[rows] for value in self.maps]
        return [value[rows] for value in self.tokens], maps


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Rows to train on and rows to score."""

    train: Tensor
    val: Tensor


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of every run."""

    head: str
    epochs: int
    batch: int
    lr: float
    warmup_steps: int


def train(clips: Clips, folds: Sequence[Fold], *, training: Training, seed: int) -> dict[str, float]:
    """A head for each fold; top-1 in percent and mean loss over all folds' clips."""
    logits, labels = [], []
    for fold in folds:
        head = _trained(clips, fold.train, training=training, seed=seed).eval()
        with torch.no_grad():
            logits += [head(*clips.part(rows)) for rows in fold.val.split(32)]
        labels.append(clips.labels[fold.val])
    found, expected = torch.cat(logits), torch.cat(labels)
    return {
        "top1": 100 * float((found.argmax(1) == expected).float().mean()),
        "val_loss": float(F.cross_entropy(found, expected)),
    }


def _trained(clips: Clips, rows: Tensor, *, training: Training, seed: int) -> Head:
    torch.manual_seed(seed)
    _, frames, _, width = clips.tokens[0].shape
    head = build_head(
        training.head,
        width=width,
        num_frames=frames,
        grid=clips.grid,
        num_classes=int(clips.labels.max()) + 1,
        temporal_cross_attention=clips.maps is not None,
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=training.lr, weight_decay=0.05)
    factor = _cosine(training.epochs * -(-len(rows) // training.batch), training.warmup_steps)
    shuffle = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(training.epochs):
        for part in rows[torch.randperm(len(rows), generator=shuffle)].split(training.batch):
            optimizer.param_groups[0]["lr"] = training.lr * factor(step)
            loss = F.cross_entropy(head(*clips.part(part)), clips.labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return head


def _cosine(steps: int, warmup: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor
