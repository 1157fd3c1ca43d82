"""Scores of a head on a cache: softmax averaged over a clip's views.

B samples, K classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from evl_cache.batches import Batch, Loader
from evl_cache.errors import EvlCacheError, NotFinite
from evl_cache.heads import Maps, Tokens
from evl_cache.precision import computing, tf32_as
from evl_cache.store import StoredBatch


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """What a head says of the clips of one class.

    Attributes:
        clips: how many there are.
        top1: percent of them whose most probable class is this one.
        mistaken_for: the class most often said instead, or None.
    """

    name: str
    clips: int
    top1: float
    mistaken_for: str | None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a head says of clips.

    Attributes:
        clips: int64 (clips,), rows of the cache's clip list.
        labels: int64 (clips,).
        probabilities: float64 (clips, K), mean over views; finite.
        loss: mean cross-entropy of single views; finite.

    Raises: NotFinite for others.
    """

    clips: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    loss: float

    def __post_init__(self) -> None:
        # A row of NaN would count as class 0: nothing can be ranked of it.
        if not (np.isfinite(self.probabilities).all() and math.isfinite(self.loss)):
            raise NotFinite(
                "probabilities or the loss are NaN or infinite: they have no score; train a head anew"
            )

    def top(self, k: int) -> float:
        """The percent of clips whose label is among the k most probable; of equals the lower class number comes first."""
        k = min(k, self.probabilities.shape[1])
        ranked = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return float(100.0 * np.mean(np.any(ranked == self.labels[:, None], axis=1)))

    def confusion(self) -> np.ndarray:
        """Count the clips by (label, class said), int64 (K, K)."""
        K = self.probabilities.shape[1]
        said = self.probabilities.argmax(axis=1)  # the first of equals, as `top`
        return np.bincount(self.labels * K + said, minlength=K * K).reshape(K, K)

    def by_class(self, names: Sequence[str]) -> list[ClassScore]:
        """Score each class that has clips, in their order."""
        rows = []
        for label, row in enumerate(self.confusion()):
            clips, wrong = int(row.sum()), row.copy()
            wrong[label] = 0
            if clips:
                other = names[int(wrong.argmax())] if wrong.any() else None
                top1 = 100.0 * float(row[label]) / clips
                rows.append(ClassScore(name=names[label], clips=clips, top1=top1, mistaken_for=other))
        return rows


@dataclass(kw_only=True)
class ViewSums:
    """Scores of one process, to be added up.

    Attributes:
        clips: clip row -> (sum of probabilities (K,), views).
        loss: sum over samples.
        refused: clip rows with a view whose logits are NaN or infinite. All processes are told before one raises.
    """

    clips: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict)
    loss: float = 0.0
    samples: int = 0
    refused: set[int] = field(default_factory=set)

    def add(self, clip: int, probabilities: np.ndarray, views: int = 1) -> None:
        """Add views of a clip."""
        before, count = self.clips.get(clip, (0.0, 0))
        self.clips[clip] = (before + probabilities, count + views)

    @torch.no_grad()
    def add_batch(
        self,
        head: nn.Module,
        batch: Batch,
        features: "StoredBatch | HeadInputs",
        loader: Loader,
        precision: str,
        *,
        part: slice = slice(None),
    ) -> None:
        """Add what a head says of a batch, or of a part of it. The head's mode is restored.

        Args:
            features: of the part, on the head's device.
            precision: to compute in.
            part: which samples of the batch they are; all by default.
        """
        was_training = head.training
        logits = head_logits(head.eval(), features, precision).cpu()  # the one wait for the device
        head.train(was_training)
        clips = loader.cache.sample_clips[batch.samples[part]].tolist()
        self.add_logits(logits, batch.labels[part].cpu(), clips)

    def add_logits(self, logits: torch.Tensor, labels: torch.Tensor, clips: Sequence[int]) -> None:
        """Add what a head says of samples, float32 (B, K): each must be finite, or its clip is refused."""
        is_finite = torch.isfinite(logits).all(dim=-1).tolist()
        self.refused |= {clip for clip, counts in zip(clips, is_finite, strict=True) if not counts}
        if not all(is_finite):
            return
        loss = _loss_sum(logits, labels)
        if not math.isfinite(loss):  # differences of huge logits
            loss = _loss_sum(logits.double(), labels)
        self.loss += loss
        self.samples += len(labels)
        for clip, row in zip(clips, class_probabilities(logits).numpy(), strict=True):
            self.add(clip, row)


def _loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The sum of samples' cross-entropies, the same to the bit in whatever order the classes are numbered."""
    # Less the largest first: of large logits the difference would lose the digits that it consists of.
    below = logits - logits.amax(dim=-1, keepdim=True)
    of_label = below.gather(1, labels[:, None])[:, 0]
    return float((below.sort(dim=-1).values.logsumexp(dim=-1) - of_label).sum())


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """What a head is called with: tokens of each of its layers, shallow to deep, and maps if it reads them."""

    tokens: Sequence[Tokens]
    maps: Sequence[Maps] | None


def head_inputs(head: nn.Module, features: StoredBatch) -> HeadInputs:
    """What a head takes of stored features that are on its device.

    Codes go to the head as they are: it decodes them inside its first pass over the tokens. Maps that are not
    stored are made first.
    """
    made: Any = features.with_made_maps()
    class_tokens_only = getattr(head, "module", head).class_tokens_only
    is_class = class_tokens_only and features.class_tokens is not None
    return HeadInputs(tokens=made.class_tokens if is_class else made.tokens, maps=made.maps)


def head_logits(
    head: nn.Module, features: StoredBatch | HeadInputs, precision: str = "float32"
) -> torch.Tensor:
    """Logits float32 (B, K) from features that are on the head's device.

    Raises: UsageError for a precision that the device cannot compute in.
    """
    device = next(head.parameters()).device
    with tf32_as(precision, device):
        inputs = features if isinstance(features, HeadInputs) else head_inputs(head, features)
        with computing(precision, device):
            logits: torch.Tensor = head(inputs.tokens, inputs.maps)
    return logits.float()


def class_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return the softmax of logits (..., K), float64. Raises: NotFinite for logits that are NaN or infinite."""
    if not bool(torch.isfinite(logits).all()):
        raise NotFinite(
            "the head's logits are NaN or infinite: they have no probabilities; use --precision float32, or a head that was "
            "trained with a lower --lr"
        )
    return torch.softmax(logits.double(), dim=-1)


def score(
    head: nn.Module,
    loader: Loader,
    *,
    device: torch.device,
    precision: str = "float32",
    on_batch: Callable[[int], None] = lambda samples: None,
) -> Scores:
    """Run a head over the loader's samples. Arguments as `view_sums`, errors as `scores_of`."""
    mine = view_sums(head, loader, device=device, precision=precision, on_batch=on_batch)
    return scores_of([mine], loader)


def view_sums(
    head: nn.Module,
    loader: Loader,
    *,
    device: torch.device,
    precision: str,
    parts: Callable[[Batch], Sequence[slice]] = lambda batch: [slice(0, len(batch.labels))],
    on_batch: Callable[[int], None] = lambda samples: None,
) -> ViewSums:
    """Run a head over this process's part of the loader's samples. The head's mode is restored.

    Args:
        precision: to compute in, one that the device can.
        parts: splits a batch into the samples of each forward pass, which are on the device one after another.
        on_batch: called with the samples of each batch.
    """
    mine = ViewSums()
    for batch in loader.epoch():
        if batch.is_stand_in:
            continue
        for part in parts(batch):
            # No name for the features: they must not live on while the next ones are moved.
            mine.add_batch(
                head,
                batch,
                batch.features.part(part.start, part.stop).to(device),
                loader,
                precision,
                part=part,
            )
        on_batch(len(batch.labels))
    return mine


def scores_of(parts: Sequence[ViewSums], loader: Loader) -> Scores:
    """Add up what all processes found.

    Raises: NotFinite where logits are NaN or infinite; EvlCacheError where no clip has features.
    """
    refused = sorted(set().union(*(part.refused for part in parts)))
    if refused:
        count = f"{len(refused)} clip{'s' if len(refused) > 1 else ''}"
        raise NotFinite(
            f"{loader.cache.place}: logits of {count} are NaN or infinite, first those of "
            f"{loader.cache.clips[refused[0]].id!r}: there is no score; use --precision float32, or a head that was trained "
            "with a lower --lr"
        )
    total = ViewSums()
    for part in parts:
        total.loss += part.loss
        total.samples += part.samples
        for clip, (probabilities, views) in part.clips.items():
            total.add(clip, probabilities, views)
    if not total.clips:
        raise EvlCacheError(
            f"{loader.cache.place}: none of the clips to score has features; see why with info"
        )
    rows = sorted(total.clips)
    labels = np.empty(len(loader.cache.clips), dtype=np.int64)
    labels[loader.cache.sample_clips] = loader.labels
    return Scores(
        clips=np.asarray(rows, dtype=np.int64),
        labels=labels[rows],
        probabilities=np.stack([total.clips[row][0] / total.clips[row][1] for row in rows]),
        loss=total.loss / total.samples,
    )
