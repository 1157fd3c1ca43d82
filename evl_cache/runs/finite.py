"""Whether tensors hold numbers only: nothing else is saved of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from evl_cache.canonical_json import not_finite_in
from evl_cache.errors import NotFinite


def extremes(tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> torch.Tensor:
    """Return the largest magnitude of all values, () on their device: NaN or infinite if one of them is.

    Nothing waits for the device. Tensors are floating point, of one device; none at all give zero.
    """
    filled = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros(())
    if filled[0].is_cuda:  # a few launches for all of them
        return torch.stack(torch._foreach_norm(filled, ord=torch.inf)).max()
    # On a CPU six times as fast as norms, which take no vector instructions here.
    return torch.stack([end for tensor in filled for end in torch.aminmax(tensor)]).abs().max()


def not_finite(content: Mapping[str, Any]) -> str | None:
    """Return the name of the first tensor or number in nested mappings that is NaN or infinite, or None.

    Waits for the device once.
    """
    named = {name: tensor for name, tensor in _tensors(content) if tensor.is_floating_point()}
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in named.values():
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    if all(bool(torch.isfinite(extremes(tensors))) for tensors in alike.values()):
        found = not_finite_in(content)
        return None if found is None else found.partition(" is ")[0]
    return next(name for name, tensor in named.items() if not bool(torch.isfinite(extremes([tensor]))))


def check_finite(content: Mapping[str, Any], path: Path) -> None:
    """Check tensors and numbers before they are written. Raises: NotFinite."""
    if (found := not_finite(content)) is not None:
        raise NotFinite(
            f"{path} is not written: {found} is NaN or infinite; use a lower --lr or --precision float32"
        )


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
