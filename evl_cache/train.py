"""Stage two: a head trained from a cache, without a video or the backbone.

The published recipe: AdamW that decays everything, cosine to zero, cross-entropy (arXiv 2208.03550, section 4).
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evl_cache.checkpoint import (
    HEAD_NAME,
    METRICS_NAME,
    RESULT_NAME,
    STATE_NAME,
    RunConfig,
    load_state,
    provenance_differences,
    read_run_config,
    save_head,
    save_state,
    write_json,
    write_run_config,
)
from evl_cache.dataset import Batch, FeatureLoader, samples_of_clips
from evl_cache.errors import UsageError
from evl_cache.heads import EVLHead, head_layers
from evl_cache.heads.evl import MODULES
from evl_cache.scoring import Scores, head_logits, score
from evl_cache.spec import digest
from evl_cache.store import FeatureCache

PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train.

    Attributes:
        head: name; head_layers: blocks it reads, by default the last cached ones.
        temporal_conv, temporal_pos_embed, temporal_cross_attention: modules of the head.
        num_heads: decoder heads; channels / 64 by default.
        epochs, steps: length; one of them.
        batch: samples of an optimiser step; accumulate: forward passes it is split into.
        lr: peak; warmup_steps: linear from zero; weight_decay: of every parameter, as published.
        dropout: in the MLP and before the classifier.
        precision: autocast of the forward pass.
    """

    head: str = "decoder4"
    head_layers: tuple[int, ...] | None = None
    temporal_conv: bool = True
    temporal_pos_embed: bool = True
    temporal_cross_attention: bool = True
    num_heads: int | None = None
    epochs: int | None = None
    steps: int | None = None
    batch: int = 64
    accumulate: int = 1
    lr: float = 4e-4
    warmup_steps: int = 0
    weight_decay: float = 0.05
    dropout: float = 0.5
    precision: str = "float32"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise UsageError(f"epochs {self.epochs} and steps {self.steps}; expected exactly one of them")
        for name in ("epochs", "steps", "batch", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")
        if self.batch % self.accumulate:
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


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Figures of a finished run; top1 and top5 in percent of `val_clips`; clips_per_s of training steps."""

    top1: float
    top5: float
    val_clips: int
    clips_per_s: float
    cache_fingerprint: str
    epochs: int
    steps: int
    seconds: float


def train(
    train_cache: FeatureCache,
    val_cache: FeatureCache,
    *,
    options: TrainOptions,
    out: Path,
    train_clips: Sequence[int] | None = None,
    val_clips: Sequence[int] | None = None,
    resume: bool = False,
    on_step: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> TrainResult:
    """Train a head and leave a run directory.

    Args:
        train_clips, val_clips: rows of the clip lists; all by default.
        out: the run directory.
        resume: go on from its last state.
        on_step: called with (steps done, steps in all, loss).

    Raises: UsageError where the caches do not fit each other or the head, or where `out` holds a run.
    """
    check_pair(train_cache, val_cache)
    layers = head_layers(options.head, train_cache.spec.layers, options.head_layers)
    with_maps = options.temporal_cross_attention and train_cache.spec.views.frames > 1
    if with_maps and not train_cache.spec.has_maps:
        raise UsageError(
            f"{train_cache.path} holds no attention maps, which temporal cross attention reads; "
            "use --no-temporal-cross-attention, or extract with --maps"
        )
    loaders = [
        FeatureLoader(
            cache,
            samples_of_clips(cache, clips),
            layers=layers,
            batch=options.batch,
            with_maps=with_maps,
            shuffle_seed=seed,
            pin_memory=torch.device(options.device).type == "cuda",
        )
        for cache, clips, seed in ((train_cache, train_clips, options.seed), (val_cache, val_clips, None))
    ]
    config = _run_config(loaders[0], loaders[1], options, layers)
    _prepare_run(out, config, resume=resume)
    trainer = Trainer(config, options, *loaders, out=out)
    if resume:
        trainer.load(load_state(out))
    return trainer.run(on_step)


class Trainer:
    """The training loop of one run: optimiser, schedule, metrics, last state."""

    def __init__(
        self,
        config: RunConfig,
        options: TrainOptions,
        train_loader: FeatureLoader,
        val_loader: FeatureLoader,
        *,
        out: Path,
    ) -> None:
        self.options, self.out = options, out
        self.train_loader, self.val_loader = train_loader, val_loader
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.head: EVLHead = config.build().to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        self.autocast_dtype = PRECISIONS[options.precision]
        # Only float16's range needs it; disabled it does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "float16")
        self.total_steps = options.steps or (options.epochs or 0) * len(train_loader)
        self.step, self.epoch, self.seconds, self.samples_seen = 0, 0, 0.0, 0

    def run(self, on_step: Callable[[int, int, float], None]) -> TrainResult:
        """Train to the last step; metrics and state after every epoch."""
        started = time.monotonic()
        scores: Scores | None = None
        while self.step < self.total_steps:
            epoch_started, samples_before = time.monotonic(), self.samples_seen
            loss = self._train_epoch(on_step)
            seconds = time.monotonic() - epoch_started
            self.seconds += seconds
            self.epoch += 1
            scores = self.validate()
            self._log(loss, scores, clips_per_s=(self.samples_seen - samples_before) / seconds)
            save_head(self.out, self.head)
            save_state(self.out, self.state())
        return self._finish(scores or self.validate(), time.monotonic() - started)

    def validate(self) -> Scores:
        """Scores of the validation clips."""
        return score(self.head, self.val_loader, device=self.device, autocast_dtype=self.autocast_dtype)

    def _train_epoch(self, on_step: Callable[[int, int, float], None]) -> float:
        """Mean loss of an epoch, or of what is left of the run."""
        self.head.train()
        losses = []
        for batch in self.train_loader.epoch(self.epoch):
            losses.append(self._train_step(batch))
            on_step(self.step, self.total_steps, losses[-1])
            if self.step == self.total_steps:
                break
        return float(np.mean(losses))

    def _train_step(self, batch: Batch) -> float:
        """One optimiser step over a batch, in as many forward passes as options say. Returns the mean loss."""
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.options.lr * self.lr_factor(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        samples = len(batch.labels)
        part = -(-self.options.batch // self.options.accumulate)
        total = torch.zeros((), device=self.device)
        for start in range(0, samples, part):
            features = batch.features.part(start, start + part).to(self.device, non_blocking=True)
            labels = batch.labels[start : start + part].to(self.device)
            logits = head_logits(self.head, features, self.autocast_dtype)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / samples
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.samples_seen += samples
        value = float(total)
        if not math.isfinite(value):
            raise UsageError(
                f"loss is {value} at step {self.step}: training diverged; use a lower --lr or --precision float32"
            )
        return value

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then cosine to zero."""
        warmup = self.options.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs to give the same losses."""
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "samples_seen": self.samples_seen,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; lines of metrics written after it are dropped."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch = state["step"], state["epoch"]
        self.seconds, self.samples_seen = state["seconds"], state["samples_seen"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        lines = (self.out / METRICS_NAME).read_text().splitlines()[: self.epoch]
        (self.out / METRICS_NAME).write_text("".join(f"{line}\n" for line in lines))

    def _log(self, loss: float, scores: Scores, *, clips_per_s: float) -> None:
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": loss,
            "val_loss": scores.loss,
            "top1": scores.top(1),
            "top5": scores.top(5),
            "lr": self.options.lr * self.lr_factor(self.step - 1),
            "clips_per_s": clips_per_s,
        }
        with (self.out / METRICS_NAME).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _finish(self, scores: Scores, seconds: float) -> TrainResult:
        result = TrainResult(
            top1=scores.top(1),
            top5=scores.top(5),
            val_clips=len(scores.clips),
            clips_per_s=self.samples_seen / self.seconds if self.seconds else 0.0,
            cache_fingerprint=self.train_loader.cache.fingerprint,
            epochs=self.epoch,
            steps=self.step,
            seconds=seconds,
        )
        write_json(self.out / RESULT_NAME, asdict(result))
        return result


def check_pair(train_cache: FeatureCache, val_cache: FeatureCache) -> None:
    """Raises: UsageError where features or classes of the two caches are not comparable."""
    differing = provenance_differences(train_cache.spec, val_cache.spec)
    if train_cache.spec.classes != val_cache.spec.classes:
        differing.append(
            f"{len(train_cache.spec.classes)} classes, not {len(val_cache.spec.classes)}, or others"
        )
    if differing:
        raise UsageError(
            f"{train_cache.path} and {val_cache.path} do not belong together: {'; '.join(differing)}"
        )


def _run_config(
    train_loader: FeatureLoader, val_loader: FeatureLoader, options: TrainOptions, layers: tuple[int, ...]
) -> RunConfig:
    spec = train_loader.cache.spec
    modules = {name: getattr(options, name) for name in MODULES}
    head_config = {
        "num_layers": len(layers),
        "width": spec.tower.width,
        "num_frames": spec.views.frames,
        "grid": list(spec.tower.grid),
        "num_classes": len(spec.classes),
        "num_heads": options.num_heads,
        "dropout": options.dropout,
        **modules,
    }
    caches = {
        name: {
            "path": str(loader.cache.path),
            "fingerprint": loader.cache.fingerprint,
            "samples": len(loader.samples),
            "samples_sha256": digest(sorted(loader.samples.tolist())),
        }
        for name, loader in (("train", train_loader), ("val", val_loader))
    }
    return RunConfig(
        head=options.head,
        head_config=head_config,
        layers=layers,
        classes=spec.classes,
        features=spec.to_json(),
        training=asdict(options),
        caches=caches,
    )


def _prepare_run(out: Path, config: RunConfig, *, resume: bool) -> None:
    if not resume:
        if (out / STATE_NAME).exists() or (out / HEAD_NAME).exists():
            raise UsageError(f"{out} holds a run already; use --resume, or another --out")
        (out / METRICS_NAME).unlink(missing_ok=True)
        write_run_config(out, config)
        return
    before = read_run_config(out)
    mine, theirs = (json.loads(json.dumps(asdict(c))) for c in (config, before))
    fields = [name for name in ("head", "head_config", "layers", "training") if mine[name] != theirs[name]]
    detail = [n for n in mine["training"] if mine["training"][n] != theirs["training"].get(n)]
    sides = [
        f"{side} {what}"
        for side in ("train", "val")
        for what, key in (("cache", "fingerprint"), ("clips", "samples_sha256"))
        if mine["caches"][side][key] != theirs["caches"][side].get(key)
    ]
    if fields or sides:
        raise UsageError(
            f"{out}: --resume with other {', '.join(detail or fields or sides)}; use the run's own, or another --out"
        )
