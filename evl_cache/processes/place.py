"""Which process this is among those of its run."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from evl_cache.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ProcessPlace:
    """This process among those of its run; alone by default.

    Attributes:
        rank: 0 for the one that writes the run directory and talks to the user.
        world: how many there are.
        local_rank: its number among those of its computer; None where nobody counts them.
        local_world: how many there are on its computer.
        restarts: how often torchrun has started them all anew.
        is_supervised: torchrun ends and restarts all where one ends with a status that is not 0.
    """

    rank: int = 0
    world: int = 1
    local_rank: int | None = None
    local_world: int = 1
    restarts: int = 0
    is_supervised: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the run directory and talks to the user."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process: its own GPU of its computer's, where `name` is `cuda` without a number."""
        return name if name != "cuda" or self.local_rank is None else f"cuda:{self.local_rank}"

    @classmethod
    def of_environment(cls) -> "ProcessPlace":
        """Return the place that torchrun tells in RANK, WORLD_SIZE and the like.

        Raises: UsageError for a WORLD_SIZE without a RANK.
        """
        local_rank = os.environ.get("LOCAL_RANK", "")
        own = int(local_rank) if local_rank.isdecimal() else None
        if "WORLD_SIZE" not in os.environ:
            return cls(local_rank=own)
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"WORLD_SIZE is set, RANK is {os.environ.get('RANK')!r}; start several processes with torchrun, or unset it"
            ) from error
        return cls(
            rank=rank,
            world=world,
            local_rank=own,
            local_world=local_world,
            restarts=restarts,
            is_supervised="TORCHELASTIC_RUN_ID" in os.environ,
        )


def this_computer() -> str:
    """Return what processes have in common that see each other under /proc: the computer, and the container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"process {os.getpid()}"
