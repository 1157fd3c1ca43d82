"""The training loop of one run, in one process or in several.

A step is the same in both: batch k of an epoch holds the same samples, and its loss is divided by their number.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from evl_cache.batches import Batch, Loader
from evl_cache.errors import EvlCacheError, UsageError
from evl_cache.heads import Head
from evl_cache.processes import Interrupted, Processes, StopRequests
from evl_cache.runs import (
    RESULT_NAME,
    HeadInputs,
    RunConfig,
    RunLog,
    Scores,
    head_inputs,
    head_logits,
    save_head,
    save_state,
    score,
    write_json,
    write_report,
)
from evl_cache.train.optimisation import Optimisation, seed_step
from evl_cache.train.options import PRECISIONS, TrainOptions
from evl_cache.train.result import Progress, TrainResult

OnStep = Callable[[int, int, float], None]
OnBottleneck = Callable[[str], None]
Take = Callable[[Batch, int, int], HeadInputs]


class Diverged(UsageError):
    """The loss of a run is no number any more."""


class Trainer:
    """The training of one run: steps, metrics, last state.

    `run` does all of it. A sweep drives several instead, batch by batch: `begin`, `step`, `end_epoch`, `finish`.

    Args:
        config: of the run. options: with the batch known. train_loader, val_loader: of this process's part.
        out: the run directory; the first process writes it. processes: that train together.
        take: gives what the head reads of samples start .. stop-1 of a batch, on the device; by default they are
            moved there.
        stop: where signals are noted; its own by default.
    """

    def __init__(
        self,
        config: RunConfig,
        options: TrainOptions,
        train_loader: Loader,
        val_loader: Loader,
        *,
        out: Path,
        processes: Processes | None = None,
        take: Take | None = None,
        stop: StopRequests | None = None,
    ) -> None:
        self.config, self.options, self.out = config, options, out
        self.processes = processes or Processes()
        self.train_loader, self.val_loader = train_loader, val_loader
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        head: Head = config.build().to(self.device)
        self.total_steps = options.steps or (options.epochs or 0) * len(train_loader)
        self.model = self.processes.wrap(head, some_unused=head.has_idle_parameters)
        self.optimisation = Optimisation(head, options, total_steps=self.total_steps)
        self.autocast_dtype = PRECISIONS[options.precision]
        self.progress = Progress()
        self.bottleneck = "device"
        self._take = take or self._moved
        self._stop = stop or StopRequests()
        self.log = RunLog(out if self.processes.is_first else None, tensorboard=options.tensorboard)

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done, and the epoch it ended."""
        return self.progress.step >= self.total_steps and not self.progress.batches

    def run(self, on_step: OnStep, on_bottleneck: OnBottleneck = lambda name: None) -> TrainResult:
        """Train to the last step.

        Raises: Interrupted where a signal asks to stop, after the state was kept; Diverged where the loss is no
            number any more; EvlCacheError where another process is lost.
        """
        started = time.monotonic()
        scores: Scores | None = None
        with self._stop, self.log:
            self.begin()
            while not self.is_finished:
                self._train_epoch(on_step, on_bottleneck)
                scores = self.validate()
                self.end_epoch(scores)
            return self.finish(scores or self.validate(), time.monotonic() - started)

    def begin(self) -> None:
        """Before the first step: what a run that is continued does again is dropped from its logs."""
        self.log.keep(steps=self.progress.step, epochs=self.progress.epoch)

    def validate(self) -> Scores:
        """Scores of the validation clips."""

        def on_batch(samples: int) -> None:
            # With several processes they would disagree: those stop at their next step.
            if self._stop.signal_number and self.processes.world == 1:
                self._interrupt(self._stop.signal_number)

        return score(
            self.optimisation.result,
            self.val_loader,
            device=self.device,
            autocast_dtype=self.autocast_dtype,
            on_batch=on_batch,
            gather=lambda sums: self.processes.gather(sums, "in validation"),
        )

    def _train_epoch(self, on_step: OnStep, on_bottleneck: OnBottleneck) -> None:
        """The rest of the epoch, or of the run."""
        progress = self.progress
        started = before = time.monotonic()
        if progress.step == self.total_steps:
            return
        for batch in self.train_loader.epoch(progress.epoch, start_batch=progress.batches):
            loss, stop = self.step(batch)
            now = time.monotonic()
            progress.epoch_seconds, before = progress.epoch_seconds + now - before, now
            on_bottleneck(self.train_loader.times.bottleneck(now - started))
            on_step(progress.step, self.total_steps, loss)
            if stop:
                self._interrupt(stop)
            if self.saves_now:
                self.save()
            if progress.step == self.total_steps:
                break
        if not progress.batches:
            raise EvlCacheError(f"{self.train_loader.cache.place}: none of the clips to train on can be used")
        self.bottleneck = self.train_loader.times.bottleneck(time.monotonic() - started)

    @property
    def saves_now(self) -> bool:
        """Whether the state is to be kept after the step just done."""
        every = self.options.save_every_steps
        return bool(every) and self.progress.step % (every or 1) == 0

    def step(self, batch: Batch) -> tuple[float, int]:
        """One optimiser step. Returns: the mean loss, and the signal that asked a process to stop, or 0.

        Raises: Diverged where the loss is no number any more.
        """
        progress, when = self.progress, f"at step {self.progress.step + 1}"
        self.model.train()
        seed_step(self.options.seed, progress.step, self.processes.rank)
        self.optimisation.begin(progress.step)
        with self.processes.watched(when):
            total = self._passes(batch)
        self.optimisation.finish(progress.step)
        sums = torch.tensor([float(total), float(self._stop.signal_number)], dtype=torch.float64)
        loss, stop = self.processes.add(sums, when).tolist()
        progress.step += 1
        if not math.isfinite(loss):
            raise Diverged(
                f"loss is {loss} at step {progress.step}: training diverged; use a lower --lr or --precision float32"
            )
        progress.batches, progress.epoch_steps = batch.number + 1, progress.epoch_steps + 1
        progress.epoch_loss += loss
        progress.epoch_samples += batch.total
        self.log.step(progress.step, {"loss": loss, "lr": self.optimisation.lr(progress.step - 1)})
        return loss, self._stop.signal_number or (signal.SIGTERM if stop else 0)

    def _passes(self, batch: Batch) -> torch.Tensor:
        """Forward and backward over this process's part, in as many passes as options say. Returns: its loss."""
        world, samples = self.processes.world, len(batch.labels)
        part = -(-self.options.global_batch // (world * self.options.accumulate))
        total = torch.zeros((), device=self.device)
        for start in range(0, samples, part):
            labels = batch.labels[start : start + part].to(self.device)
            is_last = start + part >= samples
            with self._unsynchronised() if not is_last else nullcontext():
                logits = head_logits(self.model, self._take(batch, start, start + part), self.autocast_dtype)
                loss = torch.nn.functional.cross_entropy(
                    logits, labels, reduction="sum", label_smoothing=self.options.label_smoothing
                )
                loss = loss / batch.total * (0.0 if batch.is_stand_in else 1.0)
                # Gradients are averaged over processes; those of a batch are to be added.
                self.optimisation.backward(loss * world)
            total = total + loss.detach()
        return total

    def _moved(self, batch: Batch, start: int, stop: int) -> HeadInputs:
        features = batch.features.part(start, stop).to(self.device, non_blocking=True)
        return head_inputs(self.model, features)

    def _unsynchronised(self) -> Any:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def end_epoch(self, scores: Scores) -> None:
        """Log an epoch and keep the state. scores: of the validation after it."""
        progress = self.progress
        rate = progress.epoch_samples / progress.epoch_seconds if progress.epoch_seconds else 0.0
        progress.epoch += 1
        row = {
            "epoch": progress.epoch,
            "step": progress.step,
            "train_loss": progress.epoch_loss / max(1, progress.epoch_steps),
            "val_loss": scores.loss,
            "top1": scores.top(1),
            "top5": scores.top(5),
            "lr": self.optimisation.lr(progress.step - 1),
            "clips_per_s": rate,
            "bottleneck": self.bottleneck,
        }
        self.log.epoch(progress.step, row)
        progress.samples += progress.epoch_samples
        progress.seconds += progress.epoch_seconds
        progress.batches, progress.epoch_steps, progress.epoch_samples = 0, 0, 0
        progress.epoch_loss, progress.epoch_seconds = 0.0, 0.0
        is_best = scores.top(1) > progress.best_top1
        if is_best:
            progress.best_top1, progress.best_epoch = scores.top(1), progress.epoch
        if self.processes.is_first:
            save_head(self.out, self.optimisation.result)
            if is_best:
                save_head(self.out, self.optimisation.result, best=True)
        self.save()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs to give the same losses; what is random is drawn step by step."""
        return {**self.optimisation.state(), "progress": asdict(self.progress)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.optimisation.load(state)
        self.progress = Progress(**state["progress"])

    def save(self) -> None:
        """Write the state that the run can be continued from."""
        if self.processes.is_first:
            self.log.flush()
            save_state(self.out, self.state())

    def _interrupt(self, signal_number: int) -> None:
        self.save()
        raise Interrupted(
            f"stopped after step {self.progress.step} of {self.total_steps}, which is kept; go on with "
            f"--out {self.out} --resume",
            signal_number,
        )

    def finish(self, scores: Scores, seconds: float) -> TrainResult:
        """Write what the run came to. scores: of the last validation; seconds: that it took."""
        progress = self.progress
        result = TrainResult(
            top1=scores.top(1),
            top5=scores.top(5),
            val_clips=len(scores.clips),
            clips_per_s=progress.samples / progress.seconds if progress.seconds else 0.0,
            cache_fingerprint=self.train_loader.cache.fingerprint,
            epochs=progress.epoch,
            steps=progress.step,
            seconds=seconds,
            best_top1=progress.best_top1,
            best_epoch=progress.best_epoch,
            batch=self.options.global_batch,
            skipped_clips=self.train_loader.skipped_clips + self.val_loader.skipped_clips,
            parameters=sum(p.numel() for p in self.optimisation.head.parameters()),
            ms_per_step=1e3 * progress.seconds / max(1, progress.step),
        )
        if self.processes.is_first:
            write_report(self.out, scores, self.config.classes, self.val_loader.cache.clips)
            write_json(self.out / RESULT_NAME, asdict(result))
        return result
