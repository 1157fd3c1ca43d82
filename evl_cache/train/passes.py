"""Forward and backward of a step, over this process's part of a batch."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evl_cache.batches import Batch
from evl_cache.heads import SampleMasks
from evl_cache.processes import Processes
from evl_cache.runs import HeadInputs, head_inputs, head_logits
from evl_cache.store import StoredBatch
from evl_cache.train.optimisation import Optimisation, StepRandom
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
        self._world = processes.place.world
        self._device = torch.device(options.device)

    def parts(self, batch: Batch) -> list[slice]:
        """Split a batch into the samples of each forward pass."""
        size = -(-self._options.global_batch // (self._world * self._options.accumulate))
        return [slice(start, start + size) for start in range(0, len(batch.labels), size)]

    def run(
        self, batch: Batch, inputs: Iterable[HeadInputs] | None = None, *, random: StepRandom | None = None
    ) -> torch.Tensor:
        """Take all passes of a batch.

        Args:
            inputs: what the head reads of each part, on the device; by default they are moved there.
            random: what masks of dropout are drawn from; by default torch's generators.

        Returns: the loss of this process's part, ().
        """
        parts = self.parts(batch)
        of_parts = iter(self._moved(batch) if inputs is None else inputs)
        total = torch.zeros((), device=self._device)
        keys = None if random is None else self.keys(batch, random)
        for part in parts:
            labels = moved_labels(batch.labels[part], self._device)
            with nullcontext() if part is parts[-1] else self._unsynchronised():
                # Inputs are not held: the next ones are made where these were.
                loss = self.take(
                    next(of_parts),
                    labels,
                    batch.total,
                    keys=None if keys is None else keys[part],
                    is_stand_in=batch.is_stand_in,
                )
            total = total + loss
        return total

    def take(
        self,
        inputs: HeadInputs,
        labels: torch.Tensor,
        total: int,
        *,
        keys: torch.Tensor | None,
        is_stand_in: bool = False,
    ) -> torch.Tensor:
        """Take one pass forward and backward.

        Args:
            total: samples of the step, in all processes.
            keys: of the samples, for their masks of dropout; None leaves those to torch's generators.
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

    def keys(self, batch: Batch, random: StepRandom) -> torch.Tensor:
        """Return keys of a batch's samples on the device, for their masks of dropout."""
        return moved_labels(random.keys(batch.samples), self._device)

    def inputs(self, features: StoredBatch) -> HeadInputs:
        """What the head reads of features that are on the device."""
        return head_inputs(self._model, features)

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
