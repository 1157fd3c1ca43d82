"""Large memory that is used again in every step: on a CPU, allocating it takes longer than filling it."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from evl_cache.heads.tracing import are_ordinary, is_followed, is_watched


class Workspace:
    """Memory that is taken, given back after use and taken again. Its contents are arbitrary.

    Memory that is never given back is freed as usual. Only memory of a CPU is kept: other devices' allocators keep
    theirs. What a tracer or a mode makes in the place of memory is neither kept nor mixed with what is. A copy or an
    unpickled workspace starts empty.
    """

    def __init__(self) -> None:
        self._spare: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a dense tensor, in spare memory of exactly this size if there is some."""
        if is_followed() or is_watched():
            return torch.empty(*shape, dtype=dtype, device=device)
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
            self._spare.extend(t for t in used if _is_memory(t))

    def __deepcopy__(self, memo: object) -> "Workspace":
        return Workspace()

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        return Workspace, ()


def _is_memory(tensor: Tensor) -> bool:
    """Whether a tensor is dense memory of a CPU that any later step can write to."""
    return (
        are_ordinary(tensor)
        and not (is_followed() or is_watched())
        and tensor.device.type == "cpu"
        and tensor.numel() > 0
        and tensor.is_contiguous()
        and not tensor.is_inference()
    )
