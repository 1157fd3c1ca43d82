"""Forward and backward of a step, over this process's part of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evl_cache.batches import Batch
from evl_cache.heads import SampleMasks
from evl_cache.precision import tf32_as
from evl_cache.processes import Processes
from evl_cache.runs import HeadInputs, head_inputs, head_logits
from evl_cache.store import StoredBatch
from evl_cache.train.optimisation import Optimisation, RandomState, StepRandom
from evl_cache.train.options import TrainOptions


class Passes:
    """The passes of a step: their loss, and the gradients that they add.

    Nothing here waits for the device, but for features that are still in the computer's memory: a loader fills that
    memory anew as soon as it is asked for the next batch.

    Args:
        model: the head, as the processes share it.
        optimisation: of the head.
        options: of the run.
        processes: that share a batch.
    """

    def __init__(
        self, model: nn.Module, optimisation: Optimisation, options: TrainOptions, processes: Processes
    ) -> None:
        self._model, self._optimisation, self._options = model, optimisation, options
        self._masks = SampleMasks(model)
        self._processes, self._world = processes, processes.place.world
        self._device = torch.device(options.device)
        self._total: torch.Tensor | None = None  # loss of the parts that `add` took
        self._random: RandomState | None = None  # after the last of them: a head may draw more than its masks

    def parts(self, batch: Batch) -> list[slice]:
        """Split a batch into the samples of each forward pass."""
        size = -(-self._options.global_batch // (self._world * self._options.accumulate))
        return [slice(start, start + size) for start in range(0, len(batch.labels), size)]

    @contextmanager
    def of_step(self, step: int, *, is_begun: bool) -> Iterator[StepRandom]:
        """Have the passes of a step (counted from 0) computed as the options say. Yields: what is random in it.

        Args:
            is_begun: other passes of it came before.
        """
        self._model.train()
        if not is_begun:
            self._optimisation.begin(step)
        with (
            self._processes.watched(f"at step {step + 1}"),
            tf32_as(self._options.precision, self._device),
        ):
            yield StepRandom(seed=self._options.seed, step=step, rank=self._processes.place.rank)

    def run(self, batch: Batch, random: StepRandom) -> torch.Tensor:
        """Take all passes of a batch, by what is random in the step. Returns: the loss of this process's part, ()."""
        parts = self.parts(batch)
        of_parts = self._moved(batch)
        total = torch.zeros((), device=self._device)
        keys = self.keys(batch, random)
        for part in parts:
            labels = moved_labels(batch.labels[part], self._device)
            with nullcontext() if part is parts[-1] else self._unsynchronised():
                # Inputs are not held: the next ones are made where these were.
                loss = self.take(
                    next(of_parts), labels, batch.total, keys=keys[part], is_stand_in=batch.is_stand_in
                )
            total = total + loss
        return total

    def add(self, batch: Batch, part: slice, inputs: HeadInputs, random: StepRandom) -> None:
        """Take the pass of one part of a batch; between it and the next, other heads may take theirs of the same part.

        Args:
            part: of `parts`, in their order.
            inputs: what the head reads of it, on the device.
            random: what is random in the step.
        """
        if self._total is None:
            self._total = torch.zeros((), device=self._device)
            random.begin()
        elif self._random is not None:
            self._random.restore()
        labels, keys = moved_labels(batch.labels[part], self._device), self.keys(batch, random, part)
        loss = self.take(inputs, labels, batch.total, keys=keys, is_stand_in=batch.is_stand_in)
        self._total = self._total + loss
        self._random = RandomState.of(self._device) if part.stop < len(batch.labels) else None

    def added(self) -> torch.Tensor:
        """Return the loss of the passes that `add` took, (), which ends the step."""
        total, self._total, self._random = self._total, None, None
        assert total is not None, "a step has a pass"
        return total

    def take(
        self,
        inputs: HeadInputs,
        labels: torch.Tensor,
        total: int,
        *,
        keys: torch.Tensor,
        is_stand_in: bool = False,
    ) -> torch.Tensor:
        """Take one pass forward and backward.

        Args:
            total: samples of the step, in all processes.
            keys: of the samples, for their masks of dropout.
            is_stand_in: the samples do not count.

        Returns: its share of the step's loss, (), without a gradient.
        """
        with self._masks.of(keys):
            logits = head_logits(self._model, inputs, self._options.precision)
        loss = nn.functional.cross_entropy(
            logits, labels, reduction="sum", label_smoothing=self._options.label_smoothing
        )
        loss = loss / total * (0.0 if is_stand_in else 1.0)
        # Gradients are averaged over processes; those of a batch are to be added.
        self._optimisation.backward(loss * self._world)
        return loss.detach()

    def keys(self, batch: Batch, random: StepRandom, part: slice = slice(None)) -> torch.Tensor:
        """Return keys of a batch's samples, or of a part's, on the device, for their masks of dropout."""
        return moved_labels(random.keys(batch.samples[part]), self._device)

    def inputs(self, features: StoredBatch) -> HeadInputs:
        """What the head reads of features that are on the device."""
        return head_inputs(self._model, features)

    def proof(self, batch: Batch) -> HeadInputs:
        """What the head reads of one sample of a batch, on the device."""
        return self.inputs(batch.features.part(0, 1).to(self._device))

    def _moved(self, batch: Batch) -> Iterator[HeadInputs]:
        for part in self.parts(batch):
            # No name for the features: they must not live on while the next ones are moved.
            yield self.inputs(batch.features.part(part.start, part.stop).to(self._device))

    def _unsynchronised(self) -> Any:
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else nullcontext()


def moved_labels(labels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return labels, or keys, on a device; the host does not wait for the copy, as it would without page-locked memory."""
    if device.type != "cuda" or labels.device.type == "cuda":
        return labels.to(device)
    return labels.pin_memory().to(device, non_blocking=True)
