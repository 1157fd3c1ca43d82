"""Matrix products whose operands may be of lower precision than their sums."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Have operations on a device compute in the dtypes that they are given; on a meta device nothing else is possible."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def product(a: Tensor, b: Tensor, sums: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Return the products of two batches of matrices, added up and returned in the dtype `sums`.

    Args:
        a: (G, M, K).
        b: (G, K, N), of the same dtype.
        out: where to write them, (G, M, N) of dtype `sums`.
    """
    if a.dtype == sums:
        return torch.bmm(a, b, out=out)
    if a.is_cuda and torch.version.hip is None:
        if out is not None:
            return torch.bmm(a, b, out_dtype=sums, out=out)
        return torch.bmm(a, b, out_dtype=sums)
    # Other devices have no such product: operands are widened, which gives the same sums.
    return torch.bmm(a.to(sums), b.to(sums), out=out)
