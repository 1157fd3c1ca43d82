"""Which process this is among those of its run."""

import os
from dataclasses import dataclass

from evl_cache.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ProcessPlace:
    """This process among those of its run; alone by default.

    Attributes:
        rank: 0 for the one that talks to the user. world: how many there are. local_world: on this computer.
        restarts: how often torchrun has started them all anew. is_supervised: torchrun ends and restarts all where
            one ends with a status that is not 0.
    """

    rank: int = 0
    world: int = 1
    local_world: int = 1
    restarts: int = 0
    is_supervised: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that talks to the user."""
        return self.rank == 0

    @classmethod
    def of_environment(cls) -> "ProcessPlace":
        """As torchrun tells it in RANK and WORLD_SIZE. Raises: UsageError for one without the other."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
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
            local_world=local_world,
            restarts=restarts,
            is_supervised="TORCHELASTIC_RUN_ID" in os.environ,
        )
