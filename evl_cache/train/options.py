"""How to train: options, published recipes, and what may differ between a run and its continuation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evl_cache.batches import DEFAULT_BATCH, check_seed
from evl_cache.errors import UsageError
from evl_cache.precision import PRECISIONS, device_named
from evl_cache.runs import OPERATIONAL

__all__ = ["DEFAULT_EPOCHS", "MEMORIES", "OPERATIONAL", "RECIPES", "TrainOptions", "options_of"]

MEMORIES = ("ram", "device")
DEFAULT_EPOCHS = 30
MOST_LR = 1e37  # float32 holds ten times that

# Section 4 and supplement of arXiv 2208.03550: AdamW, cosine to zero, no warm-up; everything decays.
_PUBLISHED = {
    "batch": 256,
    "lr": 4e-4,
    "warmup_steps": 0,
    "weight_decay": 0.05,
    "decay_norms_and_biases": True,
    "dropout": 0.5,
    "label_smoothing": 0.0,
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "k400": {**_PUBLISHED, "steps": 50_000},
    "ssv2": {**_PUBLISHED, "steps": 30_000},
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train a head.

    Attributes:
        head: name.
        head_layers: layers that it reads, by default the last cached ones.
        temporal_conv, temporal_pos_embed, temporal_cross_attention: modules of the head that are on.
        num_heads: attention heads; channels / 64 by default.
        epochs, steps: length; exactly one of them.
        batch: samples of an optimiser step, in all processes; `auto` is the largest that fits.
        accumulate: forward passes that a step is split into, which change it by rounding alone.
        lr: its peak; from there it falls to zero as a cosine.
        warmup_steps: steps in which it rises linearly from zero.
        weight_decay: of AdamW.
        decay_norms_and_biases: whether norms and biases decay too, as published.
        grad_clip: largest norm of all gradients together; None does not clip.
        dropout: in the MLP and before the classifier.
        label_smoothing: share of a label that is spread over all classes.
        ema: decay of the parameters' moving average, which is then validated and saved.
        precision: of `evl_cache.precision`: `float32`, `tf32`, `bfloat16` or `float16`. Validation has it too.
        seed: of initialisation and dropout.
        order_seed: of the order of the clips; `seed` by default. Runs with one order and several seeds differ in
            initialisation and dropout alone, and a sweep can train them together.
        device: where to train.
        save_every_steps: how often the state to resume from is written; every epoch by default.
        keep_in: `ram` or `device`, where samples stay after their first read; None does not keep them.
        keep_bytes: most that they may take there, in all processes of a computer or on the device of each; a share of
            what is free by default.
        read_threads: that read and decode in each process; what suits device and processors by default.
        tensorboard: also write TensorBoard's event files.
        cuda_graph: whether steps of whole batches are recorded once and replayed; by default on a GPU, where one process
            trains one head in one pass a step.
        shuffle_blocks: 0 draws an epoch's order from all samples. Otherwise blocks are permuted, and samples are
            shuffled within so many at a time. By default what suits the cache's disk; a continuation keeps it.
    """

    head: str = "decoder4"
    head_layers: tuple[int, ...] | None = None
    temporal_conv: bool = True
    temporal_pos_embed: bool = True
    temporal_cross_attention: bool = True
    num_heads: int | None = None
    epochs: int | None = None
    steps: int | None = None
    batch: int | Literal["auto"] = DEFAULT_BATCH
    accumulate: int = 1
    lr: float = 4e-4
    warmup_steps: int = 0
    weight_decay: float = 0.05
    decay_norms_and_biases: bool = True
    grad_clip: float | None = None
    dropout: float = 0.5
    label_smoothing: float = 0.0
    ema: float | None = None
    precision: str = "float32"
    seed: int = 0
    order_seed: int | None = None
    device: str = "cpu"
    save_every_steps: int | None = None
    keep_in: str | None = None
    keep_bytes: int | None = None
    read_threads: int | None = None
    tensorboard: bool = False
    cuda_graph: bool | None = None
    shuffle_blocks: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", device_named(self.device))
        check_seed("seed", self.seed)
        check_seed("order_seed", self.order_seed)
        for name, value in vars(
            self
        ).items():  # comparisons with NaN hold for nothing, so it would pass below
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{name} is {value}; expected a number")
        if (self.epochs is None) == (self.steps is None):
            raise UsageError(f"epochs {self.epochs} and steps {self.steps}; expected exactly one of them")
        for name in ("epochs", "steps", "batch", "accumulate", "save_every_steps", "read_threads"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        if self.shuffle_blocks is not None and self.shuffle_blocks < 0:
            raise UsageError(f"shuffle_blocks is {self.shuffle_blocks}; expected 0 (all samples) or more")
        if isinstance(self.batch, str) and self.batch != "auto":
            raise UsageError(f"batch {self.batch!r}; expected a number, or auto")
        if self.batch != "auto" and self.batch % self.accumulate:
            raise UsageError(
                f"batch {self.batch} is not divisible by accumulate {self.accumulate}; make it so"
            )
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if self.lr <= 0 or self.weight_decay < 0 or self.warmup_steps < 0:
            raise UsageError(
                f"lr {self.lr}, weight_decay {self.weight_decay}, warmup_steps {self.warmup_steps}; "
                "expected lr above 0, the others at least 0"
            )
        if self.lr > MOST_LR:
            raise UsageError(
                f"lr {self.lr}; expected at most {MOST_LR:g}: AdamW's first steps are ten times as large"
            )
        self._check_shares()

    def _check_shares(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing is {self.label_smoothing}; expected 0 <= label_smoothing < 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UsageError(f"ema is {self.ema}; expected a decay between 0 and 1, such as 0.999")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise UsageError(f"grad_clip is {self.grad_clip}; expected a norm above 0")
        if self.keep_in is not None and self.keep_in not in MEMORIES:
            raise UsageError(f"keep_in {self.keep_in!r}; expected one of {', '.join(MEMORIES)}")
        if self.keep_bytes is not None and (self.keep_bytes < 1 or self.keep_in is None):
            raise UsageError(
                f"keep_bytes is {self.keep_bytes} with keep_in {self.keep_in}; expected at least 1, and a place"
            )

    @property
    def clip_order_seed(self) -> int:
        """The seed that an epoch's order is drawn from."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def global_batch(self) -> int:
        """The samples of a step, once `batch` is a number."""
        assert self.batch != "auto", "resolved before training begins"
        return self.batch


def options_of(recipe: str | None, given: Mapping[str, Any]) -> TrainOptions:
    """Return the options of a recipe, or the defaults; what is given (not None) wins.

    Raises: UsageError for an unknown recipe, or options that contradict each other.
    """
    if recipe is not None and recipe not in RECIPES:
        raise UsageError(f"recipe {recipe!r}; expected one of {', '.join(RECIPES)}")
    values = {} if recipe is None else dict(RECIPES[recipe])
    explicit = {name: value for name, value in given.items() if value is not None}
    if "epochs" in explicit or "steps" in explicit:
        values.pop("steps", None)
    values |= explicit
    if "epochs" not in values and "steps" not in values:
        values["epochs"] = DEFAULT_EPOCHS
    return TrainOptions(**values)
