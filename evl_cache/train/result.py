"""How far a run is, and what it came to."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Figures of a finished run; top1 and top5 in percent of `val_clips`; clips_per_s of training steps.

    best_top1, best_epoch: of `best.safetensors`; chosen by the validation clips, so no unbiased figure of them.
    skipped_clips: asked for but without features, training and validation. batch: samples of a step.
    parameters: of the head. ms_per_step: of a training step; in a sweep without reading and decoding, which are shared.
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
class Progress:
    """How far a run is. `epoch`: epochs finished; `batches`: of the one begun, as the epoch_ sums are."""

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
