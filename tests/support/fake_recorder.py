"""Recorders of a CPU, which take a computation again where a GPU would replay it: rightly, wrongly, or not at all."""

from unittest import mock

import torch

from evl_cache.heads.dropout import Dropout, SampleMasks


class FakeRecorder:
    """Replays by computing anew and writing to where the recorded results were, as a CUDA graph does.

    Attributes:
        events: `apart`, `record`, `replay` and `forget`, as they came.
    """

    def __init__(self, head):
        self.head, self.events = head, []

    def apart(self, compute):
        self.events.append("apart")
        return compute()

    def record(self, compute):
        self.events.append("record")
        parameters = list(self.head.parameters())
        assert all(p.grad is None for p in parameters), (
            "a recorded backward pass writes gradients, or adds to old ones"
        )
        loss = compute()
        gradients = [p.grad for p in parameters]
        with torch.no_grad():
            for value in (loss, *(g for g in gradients if g is not None)):
                value.fill_(float("nan"))  # recording computes nothing
        return loss, lambda: self.replay(compute, loss, gradients)

    def replay(self, compute, loss, gradients):
        self.events.append("replay")
        parameters = list(self.head.parameters())
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        loss.copy_(compute())
        for p, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                gradient.copy_(p.grad)
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient

    def forget(self):
        self.events.append("forget")


class Constant(FakeRecorder):
    """Replays the first batch for ever: it was recorded as a constant."""

    def replay(self, compute, loss, gradients):
        if not hasattr(self, "first"):
            super().replay(compute, loss, gradients)
            self.first = [None if g is None else g.clone() for g in (loss, *gradients)]
            return
        self.events.append("replay")
        for value, first in zip((loss, *gradients), self.first, strict=True):
            if first is not None:
                value.copy_(first)


class Unseeded(FakeRecorder):
    """Replays with random numbers of its own."""

    def replay(self, compute, loss, gradients):
        torch.manual_seed(1234)
        with mock.patch.object(Dropout, "forward", torch.nn.Dropout.forward):
            super().replay(compute, loss, gradients)


class Unkeyed(FakeRecorder):
    """Replays with keys that are not those of the batch's samples."""

    def replay(self, compute, loss, gradients):
        real = SampleMasks._factors

        def factors(masks, number, probability, keys, like):
            return real(masks, number, probability, torch.zeros_like(keys), like)

        with mock.patch.object(SampleMasks, "_factors", factors):
            super().replay(compute, loss, gradients)


class Adding(FakeRecorder):
    """Adds gradients to those of the replay before."""

    def replay(self, compute, loss, gradients):
        before = [None if g is None else torch.nan_to_num(g) for g in gradients]
        super().replay(compute, loss, gradients)
        for gradient, old in zip(gradients, before, strict=True):
            if old is not None:
                gradient.add_(old)


class Unable(FakeRecorder):
    """Cannot record, as where an operation waits for the device."""

    def record(self, compute):
        self.events.append("record")
        try:
            compute()
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


class OutOfMemory(FakeRecorder):
    """Has no memory for a second result beside the recorded one."""

    def apart(self, compute):
        if "replay" in self.events:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().apart(compute)
