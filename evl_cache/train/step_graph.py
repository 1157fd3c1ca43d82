"""Forward and backward of a step, recorded once as a CUDA graph and replayed: one launch in the place of a thousand.

What is recorded names addresses. So it is replayed for batches of one size only, which lie where the recorded one lay,
and it writes gradients to one place. The optimiser stays outside: it is a few launches, and its learning rate changes.

A recording is used only when it is proved: twice, on two batches, the step is taken both ways with the same seed and
parameters, and loss and gradients must be the same. Where they are not, or nothing can be recorded, training goes on
without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from evl_cache.batches import Batch, without_hold
from evl_cache.processes import Processes
from evl_cache.store import StoredBatch
from evl_cache.train.optimisation import StepRandom
from evl_cache.train.options import TrainOptions
from evl_cache.train.passes import Passes, moved_labels
from evl_cache.train.recorder import Compute, Recorder, first_difference, recorder_of, tolerance_of

WARM_UP_STEPS = 3  # taken without: what is set up in first steps cannot be recorded
PROOFS = 2  # the second on another batch, so that nothing of the first can have been recorded as a constant
MOST_RECORDINGS = 8  # each takes as long as some steps; a loader has two or three places for batches


@dataclass(kw_only=True)
class _Recording:
    """A recorded step.

    Attributes:
        features, labels: where it reads them.
        is_own: they are memory of its own, into which batches are copied.
        keys: where it reads keys of samples, always memory of its own.
        compute: the step as it is without a recording.
        replay: takes the recorded step.
        loss: where its loss is then.
        gradients: of each parameter, where they are then.
        proofs: how often it was found right.
    """

    features: StoredBatch
    labels: torch.Tensor
    is_own: bool
    keys: torch.Tensor
    compute: Compute
    replay: Callable[[], None]
    loss: torch.Tensor
    gradients: list[torch.Tensor | None]
    proofs: int = 0

    def takes(self, batch: Batch) -> bool:
        """Put a batch where it is read. Returns: whether it is there."""
        mine = [*self.features.tensors(), self.labels]
        if not self.is_own:
            theirs = [*batch.features.tensors(), batch.labels]
            return [t.data_ptr() for t in mine] == [t.data_ptr() for t in theirs]
        for own, given in zip(self.features.tensors(), batch.features.tensors(), strict=True):
            own.copy_(given)
        self.labels.copy_(moved_labels(batch.labels, self.labels.device))
        return True


class StepGraph:
    """The recorded steps of a training: one for each place where its loader puts batches.

    Args:
        passes: of the training.
        head: that is trained.
        recorder: of its device.
        batch: samples of a whole batch; only such are recorded.
        precision: that the passes compute in.
        on_note: told in a line, once, why training goes on without.
    """

    def __init__(
        self,
        passes: Passes,
        head: nn.Module,
        recorder: Recorder,
        *,
        batch: int,
        precision: str,
        on_note: Callable[[str], None],
    ) -> None:
        self._passes, self._recorder, self._batch, self._on_note = passes, recorder, batch, on_note
        self._parameters = dict(head.named_parameters())
        self._tolerance = tolerance_of(precision)
        self._recordings: dict[int | None, _Recording] = {}
        self._warm_up, self._left = WARM_UP_STEPS, MOST_RECORDINGS
        self._is_given_up = False

    def loss(self, batch: Batch, random: StepRandom) -> torch.Tensor | None:
        """Take the passes of a step, whose parameters have no gradients yet.

        Args:
            random: what is random in it.

        Returns: its loss, which the next step may overwrite; None where the passes are still to be taken, as of a
            batch that is not whole.
        """
        is_whole = len(batch.labels) == batch.total == self._batch and not batch.is_stand_in
        if self._is_given_up or not is_whole:
            return None
        if self._warm_up:
            self._warm_up -= 1
            return None
        try:
            return self._replayed(batch, random)
        except Exception as error:  # the passes can be taken without; what is wrong with them, they say
            self._is_given_up = True
            self._on_note(f"no CUDA graph of the step, training goes on without ({_reason(error)})")
        # Behind the error, whose traceback holds what it was computing.
        self.forget()
        return None

    def _replayed(self, batch: Batch, random: StepRandom) -> torch.Tensor:
        """Take a step by its recording, or by both ways until that is proved. Returns: its loss."""
        recording = self._recording(batch, random)
        recording.keys.copy_(self._passes.keys(batch, random))
        if recording.proofs < PROOFS:
            return self._proved(recording, random)
        random.begin()
        recording.replay()
        self._set_gradients(recording.gradients)
        return recording.loss

    def forget(self) -> None:
        """Drop all recordings; new ones are made, if training has not gone on without."""
        self._recordings.clear()
        self._take_gradients()
        self._recorder.forget()

    def _recording(self, batch: Batch, random: StepRandom) -> _Recording:
        """Return the recording that takes a batch, which is new where there is none."""
        found = self._recordings.get(batch.slot)
        if found is not None and found.takes(batch):
            return found
        if not self._left:
            raise RuntimeError(f"batches lay in {MOST_RECORDINGS} places, and now in another")
        self._left -= 1
        self._recordings.pop(batch.slot, None)
        made = self._recordings[batch.slot] = self._made(batch, random)
        return made

    def _made(self, batch: Batch, random: StepRandom) -> _Recording:
        # The addresses are kept, whatever batch lies there.
        features, labels, is_own = without_hold(batch.features), batch.labels, batch.slot is None
        if is_own:
            device = next(iter(self._parameters.values())).device
            features = features.to(device).repeated(len(labels))  # in new memory
            labels = moved_labels(labels, device).clone()

        keys = self._passes.keys(batch, random).clone()

        def compute() -> torch.Tensor:
            return self._passes.take(self._passes.inputs(features), labels, len(labels), keys=keys)

        random.begin()
        self._recorder.apart(compute)
        self._take_gradients()
        random.begin()
        loss, replay = self._recorder.record(compute)
        return _Recording(
            features=features,
            labels=labels,
            is_own=is_own,
            keys=keys,
            compute=compute,
            replay=replay,
            loss=loss,
            gradients=self._take_gradients(),
        )

    def _proved(self, recording: _Recording, random: StepRandom) -> torch.Tensor:
        """Take a step both ways. Returns: the loss of the one without a recording, whose gradients count.

        Raises: RuntimeError where the two differ.
        """
        random.begin()
        loss = self._recorder.apart(recording.compute)
        gradients = self._take_gradients()
        random.begin()
        recording.replay()
        names = ["loss", *(f"gradient of {name}" for name in self._parameters)]
        found, expected = [recording.loss, *recording.gradients], [loss, *gradients]
        differing = first_difference(names, found, expected, tolerance=self._tolerance)
        if differing is not None:
            raise RuntimeError(f"replayed, the {differing} is another than by the step itself")
        recording.proofs += 1
        self._set_gradients(gradients)
        return loss

    def _take_gradients(self) -> list[torch.Tensor | None]:
        """Return the parameters' gradients, which they then have no more."""
        gradients = [parameter.grad for parameter in self._parameters.values()]
        for parameter in self._parameters.values():
            parameter.grad = None
        return gradients

    def _set_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
            parameter.grad = gradient


def step_graph(
    passes: Passes,
    head: nn.Module,
    options: TrainOptions,
    processes: Processes,
    on_note: Callable[[str], None],
) -> StepGraph | None:
    """Return what records the steps of a training; None where its options or its device leave that out.

    Args:
        on_note: told in a line, once, why training goes on without, where it was asked for or has begun.
    """
    if options.cuda_graph is False:
        return None
    if processes.place.world > 1 or options.accumulate > 1:
        if options.cuda_graph:
            on_note("no CUDA graph of the step: only one process that takes a step in one pass can record it")
        return None
    recorder = recorder_of(torch.device(options.device))
    if recorder is None:
        if options.cuda_graph:
            on_note(f"no CUDA graph of the step: {options.device} has none")
        return None
    batch, precision = options.global_batch, options.precision
    return StepGraph(passes, head, recorder, batch=batch, precision=precision, on_note=on_note)


def _reason(error: BaseException) -> str:
    """Return what was first to go wrong, in a line: a recording that fails ends with an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
