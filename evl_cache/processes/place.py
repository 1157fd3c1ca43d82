"""Which process this is among those of its run, and which of its computer's GPUs is its own."""

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evl_cache.errors import UsageError


def count_gpus() -> int:
    """Return the number of GPUs that this process sees."""
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True, kw_only=True)
class ProcessPlace:
    """This process among those of its run; alone by default.

    Attributes:
        rank: 0 for the one that writes the run directory and talks to the user.
        world: how many there are.
        local_rank: its number among those of its computer, as torchrun counts; None where it does not.
        local_world: how many there are on its computer.
        local_task: its number among the tasks of its computer, as SLURM counts; None where it does not.
        restarts: how often torchrun has started them all anew.
        is_supervised: torchrun ends and restarts all where one ends with a status that is not 0.
    """

    rank: int = 0
    world: int = 1
    local_rank: int | None = None
    local_world: int = 1
    local_task: int | None = None
    restarts: int = 0
    is_supervised: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the run directory and talks to the user."""
        return self.rank == 0

    def device(self, name: str, gpus: Callable[[], int] = count_gpus) -> str:
        """The device of this process: its own GPU of its computer's, where `name` is `cuda` without a number.

        A task of SLURM may see the GPUs of all tasks, or its own alone.

        Args:
            gpus: returns how many GPUs this process sees.
        """
        if name != "cuda":
            return name
        if self.local_rank is not None:
            return f"cuda:{self.local_rank}"
        if self.local_task is None or (seen := gpus()) == 0:
            return name
        return f"cuda:{self.local_task % seen}"

    @classmethod
    def on_computer(cls) -> "ProcessPlace":
        """Return the place among the processes of this computer alone, as torchrun tells it in LOCAL_RANK, or SLURM.

        Raises: UsageError for a LOCAL_RANK that is no number.
        """
        rank, task = _told("LOCAL_RANK", least=0), _number("SLURM_LOCALID")
        is_task = _number("SLURM_PROCID") is not None
        return cls(local_rank=rank, local_task=task if is_task else None)

    @classmethod
    def of_environment(cls) -> "ProcessPlace":
        """Return the place that torchrun tells in RANK, WORLD_SIZE and the like.

        Raises: UsageError for an environment that is half torchrun's, or whose numbers cannot be.
        """
        here = cls.on_computer()
        rank, world = _told("RANK", least=0), _told("WORLD_SIZE", least=1)
        if rank is None and world is None:
            return here
        if rank is None or world is None:
            there, lacking = ("WORLD_SIZE", "RANK") if rank is None else ("RANK", "WORLD_SIZE")
            raise UsageError(f"{there} is set and {lacking} is not; {_REMEDY} {there}")
        if rank >= world:
            raise UsageError(
                f"RANK is {rank} of a WORLD_SIZE of {world}; expected 0 to {world - 1}; {_REMEDY} both"
            )
        local_world = _told("LOCAL_WORLD_SIZE", least=1)
        if local_world is not None and (here.local_rank or 0) >= local_world:
            raise UsageError(
                f"LOCAL_RANK is {here.local_rank} of a LOCAL_WORLD_SIZE of {local_world}; expected 0 to {local_world - 1}; "
                f"{_REMEDY} both"
            )
        return cls(
            rank=rank,
            world=world,
            local_rank=here.local_rank,
            local_world=local_world or world,
            local_task=here.local_task,
            restarts=_told("TORCHELASTIC_RESTART_COUNT", least=0) or 0,
            is_supervised="TORCHELASTIC_RUN_ID" in os.environ,
        )


_REMEDY = "start several processes with torchrun, or unset"


def _told(name: str, *, least: int) -> int | None:
    """Return the number that a variable of torchrun holds, or None where it is not set. Raises: UsageError for no number."""
    text = os.environ.get(name, "")
    if not text:
        return None
    number = int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else None
    if number is None or number < least:
        raise UsageError(f"{name} is {text!r}; expected a number, {least} or more; {_REMEDY} it")
    return number


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() else None


def this_computer() -> str:
    """Return what processes have in common that see each other under /proc: the computer, and the container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"process {os.getpid()}"
