"""What a run has done so far, what it tells meanwhile, and what it came to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evl_cache.errors import UsageError
from evl_cache.runs import RunFile, Scores, read_json

OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss
OnBottleneck = Callable[[str], None]
OnNote = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Figures of a finished run.

    Attributes:
        top1, top5: percent of `val_clips`.
        clips_per_s: of training steps.
        seconds: that the run took, of all its parts where it was resumed.
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


def read_result(run: Path) -> dict[str, Any]:
    """Return the figures of a run that a sweep shows. Raises: UsageError where they are damaged, or no numbers."""
    try:
        found = read_json(run / RunFile.RESULT)
        return {name: found[name] for name in ("top1", "top5", "val_clips", "parameters", "ms_per_step")}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{run / RunFile.RESULT}: not what train writes ({error}); remove it, then go on with --resume"
        ) from error


@dataclass(kw_only=True)
class RunState:
    """What a run has done so far.

    Attributes:
        step: steps done.
        epoch: epochs finished.
        batches: batches done of the epoch that is begun; sums that begin with `epoch_` are of it too.
        epoch_loss_sum: over samples, so that a smaller last batch counts by its size.
        samples, seconds: sums over the epochs finished.
        best_top1, best_epoch: of the epoch with the highest top-1 so far.
    """

    step: int = 0
    epoch: int = 0
    batches: int = 0
    epoch_loss_sum: float = 0.0
    epoch_samples: int = 0
    epoch_seconds: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = 0

    @classmethod
    def of(cls, progress: Mapping[str, Any]) -> "RunState":
        """Return what `asdict` gave; earlier versions counted steps, and added the mean loss of each."""
        kept = dict(progress)
        if "epoch_loss" in kept:
            mean = kept.pop("epoch_loss") / max(1, kept.pop("epoch_steps"))
            kept["epoch_loss_sum"] = mean * kept["epoch_samples"]
        return cls(**kept)

    @property
    def epoch_loss(self) -> float:
        """The mean loss of the epoch's samples so far."""
        return self.epoch_loss_sum / max(1, self.epoch_samples)

    def epoch_row(self, scores: Scores) -> dict[str, Any]:
        """Return what the log says of the epoch that is begun, whose validation gave these scores."""
        return {
            "epoch": self.epoch + 1,
            "step": self.step,
            "train_loss": self.epoch_loss,
            "val_loss": scores.loss,
            "top1": scores.top(1),
            "top5": scores.top(5),
            "clips_per_s": self.epoch_samples / self.epoch_seconds if self.epoch_seconds else 0.0,
        }

    def end_epoch(self, top1: float) -> bool:
        """Count an epoch, and begin the sums of the next. Returns: whether its top-1 is the highest so far."""
        self.epoch += 1
        self.samples += self.epoch_samples
        self.seconds += self.epoch_seconds
        self.batches, self.epoch_samples = 0, 0
        self.epoch_loss_sum, self.epoch_seconds = 0.0, 0.0
        is_best = top1 > self.best_top1
        if is_best:
            self.best_top1, self.best_epoch = top1, self.epoch
        return is_best

    def result(self, scores: Scores, **others: Any) -> TrainResult:
        """Return what the run came to. Args: scores: of its last validation; others: as `TrainResult`."""
        return TrainResult(
            top1=scores.top(1),
            top5=scores.top(5),
            val_clips=len(scores.clips),
            clips_per_s=self.samples / self.seconds if self.seconds else 0.0,
            epochs=self.epoch,
            steps=self.step,
            best_top1=self.best_top1,
            best_epoch=self.best_epoch,
            ms_per_step=1e3 * self.seconds / max(1, self.step),
            **others,
        )
