"""The training loop of one run, in one process or in several.

A step is the same in both: batch k of an epoch holds the same samples, and its loss is divided by their number.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from evl_cache.batches import Batch, Loader
from evl_cache.errors import EvlCacheError, WaitEnded
from evl_cache.heads import Head
from evl_cache.processes import Interrupted, Processes, StopRequests
from evl_cache.runs import HeadInputs, RunConfig, RunLog, RunWriter, Scores, not_finite, scores_of, view_sums
from evl_cache.store import waits_end_when
from evl_cache.train.optimisation import Optimisation
from evl_cache.train.options import TrainOptions
from evl_cache.train.passes import Passes
from evl_cache.train.result import OnBottleneck, OnNote, OnStep, RunState, TrainResult
from evl_cache.train.run_output import RunOutput
from evl_cache.train.step_graph import step_graph
from evl_cache.train.step_loss import Diverged, LossReader, StepLoss, told_of_training
from evl_cache.train.stopping import Stopping


class Trainer:
    """The training of one run: steps, metrics, last state.

    `run` does all of it. A sweep drives several instead, by the parts of each batch: `begin`, `take_part`, `end_step`,
    `end_epoch`, `finish`. On a GPU the loss of a step is read when the next one has been given; `settle` reads it at once,
    and nothing is saved, scored or ended before that.

    Args:
        config: of the run.
        options: with a number for the batch.
        train_loader, val_loader: of this process's part.
        out: the run directory; the first process writes it.
        processes: that train together.
        stop: where signals are noted; its own by default.
        writer: the right to write `out`, where it can be lost.
        on_note: told in a line what training goes on without.
        records_steps: see `train_with_loaders`.

    Attributes:
        head: that is trained.
        total_steps: of the whole run.
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
        stop: StopRequests | None = None,
        writer: RunWriter | None = None,
        on_note: OnNote = lambda message: None,
        records_steps: bool = True,
    ) -> None:
        self.config, self.options, self.out = config, options, out
        self.processes = processes or Processes()
        self.train_loader, self.val_loader = train_loader, val_loader
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.head: Head = config.build().to(self.device)
        self.total_steps = options.steps or (options.epochs or 0) * len(train_loader)
        self._model = self.processes.wrap(self.head, some_unused=self.head.has_idle_parameters)
        self._optimisation = Optimisation(self.head, options, total_steps=self.total_steps)
        self._passes = Passes(self._model, self._optimisation, options, self.processes)
        self._graph = (
            step_graph(self._passes, self.head, options, self.processes, on_note) if records_steps else None
        )
        self._state, self._stop = RunState(), stop or StopRequests()
        self._began: float | None = None
        self._seconds_before = 0.0
        self._losses = LossReader(self.processes, self._stop, self.device)
        may_wait = train_loader.waits_for_server or val_loader.waits_for_server
        self._stopping = Stopping(self.processes, self._stop, waits_for_server=may_wait)
        self._on_loss: Callable[[StepLoss], None] = lambda loss: None
        is_first = self.processes.place.is_first
        self._output = RunOutput(out, is_written=is_first, writer=writer, tensorboard=options.tensorboard)

    @property
    def result_head(self) -> Head:
        """The head that is validated and saved: the one trained, or its moving average."""
        return self._optimisation.result

    @property
    def steps_done(self) -> int:
        """The optimiser steps done."""
        return self._state.step

    @property
    def epoch(self) -> int:
        """The epochs finished, which is the number of the one to go on with."""
        return self._state.epoch

    @property
    def batches(self) -> int:
        """The batches done of the epoch to go on with."""
        return self._state.batches

    @property
    def has_all_steps(self) -> bool:
        """Whether the last step is done."""
        return self._state.step >= self.total_steps

    @property
    def is_done(self) -> bool:
        """Whether the last epoch is done, or the last step and the epoch it ended: batches of no clip take no step."""
        state, epochs = self._state, self.options.epochs
        is_over = self.has_all_steps if epochs is None else state.epoch >= epochs
        return is_over and not state.batches

    @property
    def seconds(self) -> float:
        """The seconds that the run has taken, in earlier parts too, up to their last states."""
        return self._seconds_before + (0.0 if self._began is None else time.monotonic() - self._began)

    def run(self, on_step: OnStep, on_bottleneck: OnBottleneck = lambda name: None) -> TrainResult:
        """Train to the last step.

        Raises: Interrupted where a signal asks to stop, after the state was kept; Diverged where the loss becomes
            NaN or infinite; EvlCacheError where another process is lost.
        """
        scores = None
        with self._stop, waits_end_when(self._stopping.ends_waits), self.begin():
            try:
                while not self.is_done:
                    bottleneck = self._train_epoch(on_step, on_bottleneck)
                    scores = self.validate()
                    self.end_epoch(scores, bottleneck)
                return self.finish(scores or self.validate())
            except WaitEnded:
                if self._stopping.is_asked:
                    self._interrupt()
                raise

    def begin(self) -> AbstractContextManager[RunLog]:
        """Open the logs, without the lines of what a continued run does again. Returns: what closes them."""
        self._began = time.monotonic()
        self._output.log.keep(steps=self._state.step, epochs=self._state.epoch)
        return self._output.log

    def validate(self) -> Scores:
        """Score the validation clips. Raises: as `settle` and `told_of_training`."""
        self.settle()

        def on_batch(samples: int) -> None:
            # With several processes they would disagree: those stop at their next step.
            if self._stop.signal_number and self.processes.place.world == 1:
                self._interrupt()

        when = "in validation"
        with self._stopping.waiting(when):
            mine = view_sums(
                self.result_head,
                self.val_loader,
                device=self.device,
                precision=self.options.precision,
                parts=self.parts,
                on_batch=on_batch,
            )
        with told_of_training(self._state.step):
            return scores_of(self.processes.gather(mine, when), self.val_loader)

    def _train_epoch(self, on_step: OnStep, on_bottleneck: OnBottleneck) -> str:
        """Train the rest of the epoch, or of the run. Returns: what it waited for."""
        state, loader, total = self._state, self.train_loader, self.total_steps
        if state.step >= total:
            return "device"
        started = before = time.monotonic()

        def on_loss(loss: StepLoss) -> None:
            on_bottleneck(loader.times.bottleneck(time.monotonic() - started))
            on_step(loss.step, total, loss.value)

        # It must not name the trainer: each would hold the other, and samples that are kept would stay after the run.
        self._on_loss = on_loss
        for batch in self._stopping.together(loader.epoch(state.epoch, start_batch=state.batches)):
            state.epoch_seconds += time.monotonic() - before  # a step counts its own; to save is no training
            self.step(batch)
            self._interrupt_if_asked()
            self.save_if_due()
            before = time.monotonic()
            if self.has_all_steps:
                break
        if not state.batches:
            raise EvlCacheError(f"{loader.cache.place}: none of the clips to train on can be used")
        self.settle()
        self._interrupt_if_asked()
        return loader.times.bottleneck(time.monotonic() - started)

    def save_if_due(self) -> None:
        """Keep the state, where options ask for it after so many steps."""
        if self._is_save_due():
            self.save()

    def _is_save_due(self) -> bool:
        every = self.options.save_every_steps
        return every is not None and self._state.step % every == 0

    def parts(self, batch: Batch) -> list[slice]:
        """Split a batch into the samples of each forward pass."""
        return self._passes.parts(batch)

    def step(self, batch: Batch) -> None:
        """Give the device one optimiser step, and read the loss of the one before, or on a CPU its own. Raises: as `settle`."""
        started = time.monotonic()
        with self._passes.of_step(self._state.step, is_begun=False) as random:
            total = None if self._graph is None else self._graph.loss(batch, random)
            if total is None:
                random.begin()
                total = self._passes.run(batch, random)
        self._state.epoch_seconds += time.monotonic() - started
        self.end_step(batch, total)

    def take_part(self, batch: Batch, part: slice, inputs: HeadInputs) -> None:
        """Take the pass of one of a batch's parts, from what the head reads of it on the device."""
        started = time.monotonic()
        with self._passes.of_step(self._state.step, is_begun=part.start > 0) as random:
            self._passes.add(batch, part, inputs, random)
        self._state.epoch_seconds += time.monotonic() - started

    def end_step(self, batch: Batch, total: torch.Tensor | None = None) -> None:
        """End a step whose passes were taken; its loss is `total`, or that of the parts. Raises: as `step`."""
        state, started = self._state, time.monotonic()
        self._optimisation.finish(state.step)
        state.step += 1
        # A head of a sweep that diverges never goes on from its state: that needs no proof.
        proof = self._passes.proof(batch) if self._is_save_due() and total is not None else None
        total = self._passes.added() if total is None else total
        loss = self._losses.give(state.step, total, self._optimisation.health(proof), batch.total)
        state.batches = batch.number + 1
        state.epoch_samples += batch.total
        self._note(loss)
        state.epoch_seconds += time.monotonic() - started

    def settle(self) -> None:
        """Read the loss of the last step, where that is still to be done, as all that saves, scores or ends does first.

        All processes of a run do it together. Raises: Diverged where it is NaN or infinite, or a parameter is after its
        step: then nothing may be saved.
        """
        started = time.monotonic()
        self._note(self._losses.read())
        self._state.epoch_seconds += time.monotonic() - started

    def _note(self, loss: StepLoss | None) -> None:
        if loss is not None:
            self._state.epoch_loss_sum += loss.value * loss.samples
            self._output.log.step(loss.step, {"loss": loss.value, "lr": self._optimisation.lr(loss.step - 1)})
            self._on_loss(loss)

    def end_epoch(self, scores: Scores, bottleneck: str) -> None:
        """Log an epoch and keep the state.

        Args:
            scores: of the validation after it.
            bottleneck: what its training waited for.

        Raises: as `save`, before anything is written.
        """
        self._check_state()
        state = self._state
        lr = self._optimisation.lr(state.step - 1)
        self._output.check()
        self._output.log.epoch(state.step, {**state.epoch_row(scores), "lr": lr, "bottleneck": bottleneck})
        is_best = state.end_epoch(scores.top(1))
        self._output.write_head(self.result_head, is_best=is_best)
        self.save()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs to give the same losses; what is random is drawn step by step."""
        return {**self._optimisation.state(), "progress": asdict(self._state), "seconds": self.seconds}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if self._graph is not None:
            self._graph.forget()
        self._optimisation.load(state)
        self._state = RunState.of(state["progress"])
        # Earlier versions kept the seconds of steps alone.
        self._seconds_before = state.get("seconds", self._state.seconds)

    def save(self) -> None:
        """Write the state that the run can be continued from.

        Raises: as `settle`; Diverged where something else of the state is NaN or infinite, such as AdamW's moments.
        """
        self._check_state()
        self._output.write_state(self.state())

    def _check_state(self) -> None:
        """Look at all that a state holds, before it or anything of it is written. Raises: as `save`."""
        self.settle()
        if (found := not_finite(self.state())) is not None:
            raise Diverged(f"{found} is NaN or infinite after step {self._state.step}")
        if self._optimisation.overflows:
            raise Diverged(f"float16 gradients overflow at any scale, up to step {self._state.step}")

    def _interrupt_if_asked(self) -> None:
        # Several processes must stop at the same step, so they go by what they told each other.
        if self._losses.is_stopping or (self._stop.signal_number and self.processes.place.world == 1):
            self._interrupt()

    def _interrupt(self) -> NoReturn:
        self.save()
        raise Interrupted(
            f"stopped after step {self._state.step} of {self.total_steps}, which is kept; go on with "
            f"--out {self.out} --resume",
            self._stopping.signal_number,
        )

    def finish(self, scores: Scores) -> TrainResult:
        """Write what the run came to. Args: scores: of the last validation."""
        self.settle()
        result = self._state.result(
            scores,
            seconds=self.seconds,
            cache_fingerprint=self.train_loader.cache.fingerprint,
            batch=self.options.global_batch,
            skipped_clips=self.train_loader.skipped_clips + self.val_loader.skipped_clips,
            parameters=sum(p.numel() for p in self.head.parameters()),
        )
        self._output.write_result(result, scores, self.config.classes, self.val_loader.cache.clips)
        return result
