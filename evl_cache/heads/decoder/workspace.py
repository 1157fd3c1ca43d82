"""Large memory that is used in every step: on a CPU, asking for it anew costs more than filling it."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """Memory given back after use, for the next taker. Its contents are arbitrary.

    Memory that is never given back is merely freed. On other devices than a CPU, whose allocators keep memory
    themselves, nothing is held. A copy, or what is read from a pickle, starts empty.
    """

    def __init__(self) -> None:
        self._spare: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A dense tensor, in spare memory of just this size if there is any."""
        size = torch.Size(shape).numel()
        with self._lock:
            for i, spare in enumerate(self._spare):
                if spare.dtype == dtype and spare.numel() == size and spare.device == device:
                    return self._spare.pop(i).view(*shape)
            # Sizes have changed, say from training to validation: do not hoard those of before.
            self._spare.clear()
        with torch.inference_mode(False):  # or autograd could not use it later
            return torch.empty(*shape, dtype=dtype, device=device)

    def give_back(self, *used: Tensor) -> None:
        """Keep the memory of dense tensors that came from `take`."""
        with self._lock:
            self._spare.extend(t for t in used if t.device.type == "cpu" and t.numel())

    def __deepcopy__(self, memo: object) -> "Workspace":
        return Workspace()

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()
