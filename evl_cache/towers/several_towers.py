"""What is said of a weights file with several towers that differ, and how one of them is saved alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from evl_cache.towers.weights import Candidate, extra

_MOST_LEFT_OUT = 8  # beginnings of names in a line of code
_LONGEST_NAME = 200  # characters of keys and a prefix in a line of code
_NAMED = 3  # towers in a line


def told_of_several(
    path: Path, differing: Sequence[Candidate], own: Mapping[str, torch.Tensor], pretrained: str
) -> str:
    """Return what is said of sets of weights that all fit a tower, and a line of Python that saves one of them.

    Args:
        differing: those without other names beside them first, as each can be saved in a short line.
        own: the tower's tensors by name.
    """
    more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    told = (
        f"weights {pretrained!r} hold {len(differing)} towers that fit and differ: "
        f"{' and '.join(map(str, differing[:_NAMED]))}{more}; save the one you mean alone"
    )
    for each in differing:
        if code := _saving(path, each, own):
            return f"{told}, as {code} does for {each}"
    return told


def _saving(path: Path, tower: Candidate, own: Mapping[str, torch.Tensor]) -> str | None:
    """Return Python that saves a tower alone, reading the file as it is read here; None where no short line does."""
    prefix, left_out = tower.prefix, _beginnings(extra(tower.tensors, own))
    is_literal = all(isinstance(key, str | int) for key in tower.container)
    if not is_literal or len(left_out) > _MOST_LEFT_OUT or any(name.startswith(left_out) for name in own):
        return None
    keys, others = repr(tower.container), repr(tuple(prefix + start for start in left_out))
    if len(keys) + len(prefix) + len(others) > _LONGEST_NAME:
        return None
    conditions = [
        *([f"n.startswith({prefix!r})"] if prefix else []),
        *([f"not n.startswith({others})"] if left_out else []),
    ]
    chosen = f"{{n: v for n, v in s.items() if {' and '.join(conditions)}}}" if conditions else "s"
    return (
        "import torch; from evl_cache.towers import read_tower_weights; "
        f"s = read_tower_weights({str(path)!r}).containers[{keys}]; torch.save({chosen}, 'one.pt')"
    )


def _beginnings(names: Sequence[str]) -> tuple[str, ...]:
    """Return the first parts of names with their dots, each once."""
    return tuple(dict.fromkeys("".join(name.partition(".")[:2]) for name in names))
