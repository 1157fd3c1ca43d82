"""What a run has done so far, what it tells meanwhile, and what it came to."""

from collections.abc import Callable
from dataclasses import dataclass

OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss
OnBottleneck = Callable[[str], None]
OnNote = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Figures of a finished run.

    Attributes:
        top1, top5: percent of `val_clips`.
        clips_per_s: of training steps.
        best_top1, best_epoch: of `best.safetensors`. The validation clips chose it, so they do not judge it fairly.
        batch: samples of a step.
        skipped_clips: clips for training and validation that have no features.
        parameters: of the head.
        ms_per_step: of a training step; in a sweep without reading and decoding, which are shared.
    """

    top1: float
    top5: float
    val_clips: int
    clips_per_s: float
    cache_fingerprint: str
    epochs: int
    steps: int
    seconds: float
    best_top1: float
    best_epoch: int
    batch: int
    skipped_clips: int
    parameters: int
    ms_per_step: float


@dataclass(kw_only=True)
class RunState:
    """What a run has done so far.

    Attributes:
        step: steps done.
        epoch: epochs finished.
        batches: batches done of the epoch that is begun; sums that begin with `epoch_` are of it too.
        samples, seconds: sums over the epochs finished.
        best_top1, best_epoch: of the epoch with the highest top-1 so far.
    """

    step: int = 0
    epoch: int = 0
    batches: int = 0
    epoch_steps: int = 0
    epoch_loss: float = 0.0
    epoch_samples: int = 0
    epoch_seconds: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = 0
