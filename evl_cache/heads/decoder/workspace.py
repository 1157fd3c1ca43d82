"""Large memory that is used again in every step: on a CPU, allocating it takes longer than filling it."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """Memory that is taken, given back after use and taken again. Its contents are arbitrary.

    Memory that is never given back is freed as usual. Only memory of a CPU is kept: other devices' allocators keep
    theirs. A copy or an unpickled workspace starts empty.
    """

    def __init__(self) -> None:
        self._spare: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a dense tensor, in spare memory of exactly this size if there is some."""
        size = torch.Size(shape).numel()
        with self._lock:
            for i, spare in enumerate(self._spare):
                if spare.dtype == dtype and spare.numel() == size and spare.device == device:
                    return self._spare.pop(i).view(*shape)
            # Sizes have changed, as from training to validation: free memory of the old sizes.
            self._spare.clear()
        with torch.inference_mode(False):  # an inference tensor could not be used by autograd later
            return torch.empty(*shape, dtype=dtype, device=device)

    def give_back(self, *used: Tensor) -> None:
        """Keep the memory of dense tensors that came from `take`."""
        with self._lock:
            self._spare.extend(t for t in used if t.device.type == "cpu" and t.numel())

    def __deepcopy__(self, memo: object) -> "Workspace":
        return Workspace()

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()
