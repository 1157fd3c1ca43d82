"""Several processes that train one head, as `torchrun` starts them: what they tell each other, and losing one."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from evl_cache.errors import EvlCacheError
from evl_cache.processes.master import listening_at, master
from evl_cache.processes.place import ProcessPlace

DEFAULT_TIMEOUT_S = 600.0
_LOOK_S = 0.1
_SIGNS_OF_LOSS = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "peer")

ResultT = TypeVar("ResultT")


class ToldElsewhere(EvlCacheError):
    """The first process met an error and tells it to the user; this one only ends."""


class _Words(Protocol):
    """What a store of `torch.distributed` does."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, as one of them sees them; this one alone by default.

    Attributes:
        place: which one this is.
        store: where one leaves word for the others, which they find while they do not gather; None where there is none.
    """

    place: ProcessPlace = field(default_factory=ProcessPlace)
    store: _Words | None = field(default=None, repr=False, compare=False)

    def wrap(self, head: nn.Module, *, some_unused: bool) -> nn.Module:
        """Return the head so that it starts as the first process's, and its gradients are averaged over processes.

        Args:
            some_unused: parameters may have no gradient.
        """
        if self.place.world == 1:
            return head
        with self.watched("at the start"):
            return nn.parallel.DistributedDataParallel(head, find_unused_parameters=some_unused)

    def add(
        self, values: torch.Tensor, when: str, *, meanwhile: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """Sum values, which are on the CPU, over processes.

        Args:
            meanwhile: called again and again until all have come. Signals are noted only where it is given: a sum is one
                call of torch, which they do not interrupt.
        """
        if self.place.world == 1:
            return values
        total = values.clone()
        with self.watched(when):
            if meanwhile is None:
                dist.all_reduce(total)
            else:
                _wait_beside(dist.all_reduce(total, async_op=True), meanwhile)
        return total

    def leave_word(self, word: str) -> None:
        """Leave word for the other processes, which does not wait for any."""
        if self.store is not None:
            self.store.set(word, "")

    def has_word(self, word: str) -> bool:
        """Whether a process left word. Threads may ask; nothing waits for another process."""
        try:
            return self.store is not None and self.store.check([word])
        except RuntimeError:  # the process that keeps words is lost: the next sum says so in one line
            return False

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


def _wait_beside(work: dist.Work, meanwhile: Callable[[], None]) -> None:
    """Wait for what processes do together. Raises: what it raises."""
    done = threading.Event()
    work.get_future().add_done_callback(lambda future: done.set())
    while not done.wait(_LOOK_S):
        meanwhile()
    work.wait()


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
    with Processes(place=place).watched("at the start"), listening_at(port):
        backend, timeout = "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timedelta(seconds=timeout_s)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout
        )
    processes = Processes(place=place, store=store)
    yield processes
    # Together, so that none finds another gone; not after an error: taking leave of a lost one may wait for ever.
    processes.add(torch.zeros(1), "at the end")
    # A head that DistributedDataParallel wrapped may be in a cycle, and holds the group, whose threads then end after the
    # interpreter. A process that was aborted at its very end, once and under load, may have been such a one.
    gc.collect()
    dist.destroy_process_group()
