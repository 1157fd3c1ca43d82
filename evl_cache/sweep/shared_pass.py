"""Several heads trained in one pass over the batches: each batch is read, moved and decoded once for all of them."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from evl_cache.batches import Batch, Loader
from evl_cache.errors import NotFinite, WaitEnded
from evl_cache.heads import EVLHead, Workspace
from evl_cache.precision import PRECISIONS, tf32_as
from evl_cache.processes import Interrupted, ProcessPlace, StopRequests, training_environment
from evl_cache.runs import RunFile, RunWriter, Scores, ViewSums, load_state, scores_of
from evl_cache.store import Reads, waits_end_when
from evl_cache.sweep.grid import SweepRun
from evl_cache.sweep.shared_batch import SharedBatch
from evl_cache.train import Trainer, prepare_run, run_config, told_of_training

OnPassStep = Callable[[int, int, int], None]  # steps done, steps in all, heads that still train


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run to train.

    Attributes:
        run: its name and options.
        reads: what its head reads of the caches.
        sample_nbytes: bytes of a sample that this is, by side, `train` and `val`.
    """

    run: SweepRun
    reads: Reads
    sample_nbytes: Mapping[str, int]


@dataclass(kw_only=True)
class Member:
    """One run of a pass.

    Attributes:
        run: its name and options.
        reads: what its head reads of the caches.
        trainer: that trains it.
        error: why it ended early, if it did.
        scores: of its last validation.
    """

    run: SweepRun
    reads: Reads
    trainer: Trainer
    error: str | None = None
    scores: Scores | None = None

    def has_done(self, epoch: int, batch: int) -> bool:
        """Whether a batch of an epoch is behind it: after a kill some heads are further than others."""
        trainer = self.trainer
        return trainer.epoch > epoch or trainer.has_all_steps or trainer.batches > batch


class SweepPass:
    """The training loop of several heads; each leaves a run directory as a training of its own would.

    Args:
        runs: with the same length, batch and precision.
        reads: of all heads together.
        train_loader, val_loader: that read so.
        folder: of the run directories.
        stop: where signals are noted.
        writer: the right to write the sweep.
        command: that each run records, if it is known.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        reads: Reads,
        train_loader: Loader,
        val_loader: Loader,
        *,
        folder: Path,
        stop: StopRequests,
        writer: RunWriter,
        command: str | None,
    ) -> None:
        self.train_loader, self.val_loader = train_loader, val_loader
        self._reads, self._stop, self._writer, self._command = reads, stop, writer, command
        options = runs[0].run.options
        self.device = torch.device(options.device)
        self.precision = options.precision
        self.members = [self._member(planned, folder / planned.run.name) for planned in runs]
        workspace = Workspace()  # heads take turns
        for member in self.members:
            if isinstance(member.trainer.head, EVLHead):
                member.trainer.head.workspace = workspace

    def run(self, on_step: OnPassStep) -> None:
        """Train all to the last step. A head that diverges is stopped, `error` says why, and the others go on.

        Raises: Interrupted where a signal asks to stop, after every state was kept.
        """
        with contextlib.ExitStack() as kept:
            kept.enter_context(waits_end_when(lambda: bool(self._stop.signal_number)))
            for member in self._training():  # of others the log stays as it is
                kept.enter_context(member.trainer.begin())
            try:
                self._train(on_step)
            except WaitEnded:
                self._interrupt_if_asked()
                raise

    def _train(self, on_step: OnPassStep) -> None:
        while waiting := [m for m in self._training() if not m.trainer.is_done]:
            self._epoch(min(m.trainer.epoch for m in waiting), on_step)
        self._validate([m for m in self._training() if m.scores is None])
        for member in self._training():
            assert member.scores is not None
            member.trainer.finish(member.scores)

    def _training(self) -> list[Member]:
        return [m for m in self.members if m.error is None]

    def _epoch(self, epoch: int, on_step: OnPassStep) -> None:
        """Train the heads that have not finished an epoch to its end, and validate them."""
        here = [m for m in self._training() if m.trainer.epoch == epoch]
        started = time.monotonic()
        first = min(m.trainer.batches for m in here)
        if not all(m.trainer.has_all_steps for m in here):
            for batch in self.train_loader.epoch(epoch, start_batch=first):
                self._step(batch, epoch, here)
                here = [m for m in here if m.error is None]
                if not here:
                    return
                on_step(max(m.trainer.steps_done for m in here), here[0].trainer.total_steps, len(here))
                self._interrupt_if_asked()
                if all(m.trainer.has_all_steps for m in here):
                    break
        bottleneck = self.train_loader.times.bottleneck(time.monotonic() - started)
        for member in here:
            _unless_diverged(member, member.trainer.settle)
        for member in self._validate([m for m in here if m.error is None]):
            assert member.scores is not None
            _unless_diverged(member, partial(member.trainer.end_epoch, member.scores, bottleneck))

    def _step(self, batch: Batch, epoch: int, members: Sequence[Member]) -> None:
        """Have every head that has not seen a batch take its step on it; each part is decoded once, one at a time."""
        here = [m for m in members if not m.has_done(epoch, batch.number)]
        if not here:
            return
        for part in here[0].trainer.parts(batch):
            shared = self._share(batch, part)
            for member in here:
                member.trainer.take_part(batch, part, shared.inputs(member.reads))
            del shared  # before the next one is decoded
        for member in here:
            if _unless_diverged(member, partial(member.trainer.end_step, batch)):
                _unless_diverged(member, member.trainer.save_if_due)

    def _validate(self, members: Sequence[Member]) -> list[Member]:
        """Score each head on the validation clips, in one pass over them. Returns: those that have a score."""
        sums = [ViewSums() for _ in members]
        for batch in self.val_loader.epoch() if members else ():
            for part in members[0].trainer.parts(batch):
                self._add_scores(batch, part, members, sums)
            self._interrupt_if_asked()
        return [
            m
            for m, found in zip(members, sums, strict=True)
            if _unless_diverged(m, partial(self._score, m, found))
        ]

    def _score(self, member: Member, found: ViewSums) -> None:
        with told_of_training(member.trainer.steps_done):
            member.scores = scores_of([found], self.val_loader)

    def _add_scores(
        self, batch: Batch, part: slice, members: Sequence[Member], sums: Sequence[ViewSums]
    ) -> None:
        """Add what each head says of a part of a validation batch."""
        shared = self._share(batch, part)
        for member, found in zip(members, sums, strict=True):
            inputs, head = shared.inputs(member.reads), member.trainer.result_head
            found.add_batch(head, batch, inputs, self.val_loader, self.precision, part=part)

    def _share(self, batch: Batch, part: slice) -> SharedBatch:
        features = batch.features.part(part.start, part.stop).to(self.device)
        products = PRECISIONS[self.precision].autocast_dtype or torch.float32
        with tf32_as(self.precision, self.device):  # maps that are not stored are made here
            return SharedBatch(features, self._reads, products=products)

    def _interrupt_if_asked(self) -> None:
        if not self._stop.signal_number:
            return
        for member in self._training():
            _unless_diverged(member, member.trainer.save)
        done = max(m.trainer.steps_done for m in self.members)
        raise Interrupted(
            f"stopped after step {done} of a pass of {len(self.members)} heads, which is kept; go on with --resume",
            self._stop.signal_number,
        )

    def _member(self, planned: PlannedRun, out: Path) -> Member:
        """Return a run with its trainer, which goes on from the state in its run directory if there is one."""
        run, reads = planned.run, planned.reads
        config = run_config(
            self.train_loader.cache,
            {"train": self.train_loader, "val": self.val_loader},
            run.options,
            reads.layers,
        )
        caches = {
            side: {**cache, "sample_nbytes": planned.sample_nbytes[side]}
            for side, cache in config.caches.items()
        }
        environment = training_environment(
            run.options.device, run.options.precision, ProcessPlace(), self._command
        )
        config = replace(config, caches=caches, environment=environment)
        resume = (out / RunFile.STATE).exists()
        if not resume:  # a head whose state was not kept any more begins anew
            for name in (RunFile.HEAD, RunFile.BEST):
                (out / name).unlink(missing_ok=True)
        prepare_run(out, config, resume=resume)
        trainer = Trainer(
            config,
            run.options,
            self.train_loader,
            self.val_loader,
            out=out,
            stop=self._stop,
            writer=self._writer,
            records_steps=False,  # heads share what is decoded of a batch
        )
        (out / RunFile.RESULT).unlink(missing_ok=True)
        member = Member(run=run, reads=reads, trainer=trainer)
        if resume:
            _unless_diverged(member, lambda: trainer.load(load_state(out)))
        return member


def _unless_diverged(member: Member, act: Callable[[], None]) -> bool:
    """Have a member act; where something of it turns out to be no number, it ends there. Returns: whether it goes on."""
    try:
        act()
    except NotFinite as error:
        member.error = str(error)
    return member.error is None
