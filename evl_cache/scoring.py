"""Scores of a head on a cache: softmax averaged over a clip's views.

B samples, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from evl_cache.dataset import FeatureLoader
from evl_cache.heads import EVLHead
from evl_cache.store import StoredBatch


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a head says of clips.

    Attributes:
        clips: int64 (clips,), rows of the cache's clip list.
        labels: int64 (clips,).
        probabilities: float64 (clips, K), mean over views.
        loss: mean cross-entropy of single views.
    """

    clips: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    loss: float

    def top(self, k: int) -> float:
        """Percent of clips whose label is among the k most probable; ties count for the lower class number."""
        k = min(k, self.probabilities.shape[1])
        ranked = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return float(100.0 * np.mean(np.any(ranked == self.labels[:, None], axis=1)))


def head_logits(
    head: EVLHead, features: StoredBatch, autocast_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Logits float32 (B, K) from stored features that are on the head's device.

    Codes go to the head as they are: it decodes them inside its first pass over the tokens.
    """
    device_type = head.class_query.device.type
    with torch.autocast(device_type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        logits: torch.Tensor = head(features.tokens, features.maps)
    return logits.float()


@torch.no_grad()
def score(
    head: EVLHead,
    loader: FeatureLoader,
    *,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    on_batch: Callable[[int], None] = lambda samples: None,
) -> Scores:
    """Run a head over the loader's samples. The head's mode is restored."""
    was_training = head.training
    head.eval()
    sums: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    loss_sum, samples = 0.0, 0
    for batch in loader.epoch():
        logits = head_logits(head, batch.features.to(device), autocast_dtype)
        labels = batch.labels.to(device)
        loss_sum += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        samples += len(labels)
        probabilities = torch.softmax(logits.double(), dim=-1).cpu().numpy()
        for clip, row in zip(loader.cache.sample_clips[batch.samples].tolist(), probabilities, strict=True):
            sums[clip] = sums.get(clip, 0.0) + row
            counts[clip] = counts.get(clip, 0) + 1
        on_batch(len(labels))
    head.train(was_training)
    clips = np.asarray(sorted(sums), dtype=np.int64)
    return Scores(
        clips=clips,
        labels=np.asarray([loader.cache.clips[clip].label for clip in clips], dtype=np.int64),
        probabilities=np.stack([sums[clip] / counts[clip] for clip in clips]),
        loss=loss_sum / samples,
    )
