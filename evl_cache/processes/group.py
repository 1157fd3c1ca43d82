"""Several processes that train one head, as `torchrun` starts them: what they tell each other, and losing one."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from evl_cache.errors import EvlCacheError
from evl_cache.processes.place import ProcessPlace

DEFAULT_TIMEOUT_S = 600.0
_SIGNS_OF_LOSS = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "peer")

ResultT = TypeVar("ResultT")


class ToldElsewhere(EvlCacheError):
    """The first process met an error and tells it; this one only ends."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of a run; alone by default.

    Attributes:
        rank: 0 for the one that writes. world: how many there are. local_world: on this computer.
    """

    rank: int = 0
    world: int = 1
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the run directory and talks to the user."""
        return self.rank == 0

    def wrap(self, head: nn.Module, *, some_unused: bool) -> nn.Module:
        """The head whose gradients are averaged over processes in the backward pass, and whose start is the first's.

        some_unused: parameters may have no gradient.
        """
        if self.world == 1:
            return head
        with self.watched("at the start"):
            return nn.parallel.DistributedDataParallel(head, find_unused_parameters=some_unused)

    def add(self, values: torch.Tensor, when: str) -> torch.Tensor:
        """Sums over processes, the same in each; values on the CPU."""
        if self.world == 1:
            return values
        total = values.clone()
        with self.watched(when):
            dist.all_reduce(total)
        return total

    def gather(self, value: ResultT, when: str) -> list[ResultT]:
        """Every process's value, by rank; values that pickle."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self.watched(when):
            dist.all_gather_object(found, value)
        return found

    def on_first(self, function: Callable[[], ResultT], when: str) -> ResultT:
        """What `function` returns in the first process, in all; its error ends all of them, told once."""
        if self.world == 1:
            return function()
        told: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                told = [function(), None]
            except (EvlCacheError, OSError) as caught:
                told, error = [None, str(caught)], caught
        with self.watched(when):
            dist.broadcast_object_list(told)
        if error is not None:
            raise error
        if told[1] is not None:
            raise ToldElsewhere(str(told[1]))
        result: ResultT = told[0]
        return result

    @contextmanager
    def watched(self, when: str) -> Iterator[None]:
        """Raises: EvlCacheError where another process of the run is lost meanwhile."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(s in str(error).lower() for s in _SIGNS_OF_LOSS)
            if self.world == 1 or not lost or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).splitlines()[0].rsplit("] ", 1)[-1][:160]
            raise EvlCacheError(
                f"process {self.rank} of {self.world} lost another one {when} ({reason}); see that one's own error, "
                "then go on from the last state with --resume"
            ) from error


@contextmanager
def processes_of_environment(
    device: str = "cpu", *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Iterator[Processes]:
    """Join the processes that `torchrun` started; one alone where it did not.

    Args:
        device: of this process: NCCL for CUDA, gloo otherwise. timeout_s: a process not heard of for so long is lost.

    Raises: UsageError for an environment that is half torchrun's.
    """
    place = ProcessPlace.of_environment()
    if place.world == 1:
        yield Processes()
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    processes = Processes(rank=place.rank, world=place.world, local_world=place.local_world)
    with processes.watched("at the start"):
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    yield processes
    # Together, so that none finds another gone; not after an error: taking leave of a lost one may wait for ever.
    processes.add(torch.zeros(1), "at the end")
    # A head that DistributedDataParallel wrapped may be in a cycle, and holds the group, whose threads then end after the
    # interpreter. A process that was aborted at its very end, once and under load, may have been such a one.
    gc.collect()
    dist.destroy_process_group()


def local_device(device: str) -> str:
    """The GPU of this process among those of its computer, where `device` names none."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device
