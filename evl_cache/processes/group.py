"""Several processes that train one head, as `torchrun` starts them: what they tell each other, and losing one."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from evl_cache.errors import EvlCacheError
from evl_cache.processes.master import listening_at, master
from evl_cache.processes.place import ProcessPlace

DEFAULT_TIMEOUT_S = 600.0
_SIGNS_OF_LOSS = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "peer")

ResultT = TypeVar("ResultT")


class ToldElsewhere(EvlCacheError):
    """The first process met an error and tells it to the user; this one only ends."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, as one of them sees them; this one alone by default.

    Attributes:
        place: which one this is.
    """

    place: ProcessPlace = field(default_factory=ProcessPlace)

    def wrap(self, head: nn.Module, *, some_unused: bool) -> nn.Module:
        """Return the head so that it starts as the first process's, and its gradients are averaged over processes.

        Args:
            some_unused: parameters may have no gradient.
        """
        if self.place.world == 1:
            return head
        with self.watched("at the start"):
            return nn.parallel.DistributedDataParallel(head, find_unused_parameters=some_unused)

    def add(self, values: torch.Tensor, when: str) -> torch.Tensor:
        """Sum values, which are on the CPU, over processes."""
        if self.place.world == 1:
            return values
        total = values.clone()
        with self.watched(when):
            dist.all_reduce(total)
        return total

    def gather(self, value: ResultT, when: str) -> list[ResultT]:
        """Collect every process's value, which pickles, by rank."""
        if self.place.world == 1:
            return [value]
        found: list[Any] = [None] * self.place.world
        with self.watched(when):
            dist.all_gather_object(found, value)
        return found

    def on_first(self, function: Callable[[], ResultT], when: str) -> ResultT:
        """Call `function` in the first process, and return in all what it returned; its error ends all, told once."""
        if self.place.world == 1:
            return function()
        told: list[Any] = [None, None]
        error: Exception | None = None
        if self.place.is_first:
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
        """Tell a lost process from other errors. Raises: EvlCacheError where another one of the run is lost meanwhile."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(s in str(error).lower() for s in _SIGNS_OF_LOSS)
            if self.place.world == 1 or not lost or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).splitlines()[0].rsplit("] ", 1)[-1][:160]
            raise EvlCacheError(
                f"process {self.place.rank} of {self.place.world} lost another one {when} ({reason}); see that one's own error, "
                "then go on from the last state with --resume"
            ) from error


@contextmanager
def processes_of_environment(
    device: str = "cpu", *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, or be one alone.

    Args:
        device: of this process: NCCL for CUDA, gloo otherwise.
        timeout_s: a process not heard of for so long is lost.

    Raises: UsageError for an environment that is half torchrun's, or whose port is another program's.
    """
    place = ProcessPlace.of_environment()
    if place.world == 1:
        yield Processes()
        return
    _, port = master()
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    processes = Processes(place=place)
    with processes.watched("at the start"), listening_at(port):
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    yield processes
    # Together, so that none finds another gone; not after an error: taking leave of a lost one may wait for ever.
    processes.add(torch.zeros(1), "at the end")
    # A head that DistributedDataParallel wrapped may be in a cycle, and holds the group, whose threads then end after the
    # interpreter. A process that was aborted at its very end, once and under load, may have been such a one.
    gc.collect()
    dist.destroy_process_group()
