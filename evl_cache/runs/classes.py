"""Which class of a head a cache's label means: the one of the same name, and by number only where one side has no names.

H classes of the head, C classes of the cache.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evl_cache.clips import class_numbers
from evl_cache.errors import UsageError

_MOST_NAMED = 3
_BETWEEN_WORDS = re.compile(r"[\s_-]+")


@dataclass(frozen=True, kw_only=True)
class ClassMatch:
    """How the classes of a cache are those of a head.

    Attributes:
        numbers: int64 (C,), the head's number of each class of the cache; None where both number them alike.
        by_number: whether one side has names and the other only numbers, so that nothing but numbers could be compared.
    """

    numbers: np.ndarray | None
    by_number: bool = False

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """Return the head's class numbers of labels of the cache, int64."""
        return labels if self.numbers is None else self.numbers[labels]


def are_numbers(classes: Sequence[str]) -> bool:
    """Return whether classes have no names but their numbers."""
    return tuple(classes) == class_numbers(len(classes))


def match_classes(
    head: Sequence[str], cache: Sequence[str], *, numbers_may_have_names: bool = False
) -> ClassMatch:
    """Match the classes of a cache with those of a head: by name, so that neither their order nor their number counts.

    Spaces, underscores, hyphens and capitals of names count only where classes differ in nothing else.

    Args:
        numbers_may_have_names: where one side has names and the other numbers, numbers are compared, if they can be.

    Raises: UsageError that says what differs, where the cache has a class that the head has not.
    """
    if tuple(head) == tuple(cache):
        return ClassMatch(numbers=None)
    found = _by_names(head, cache)
    if found is not None:
        return ClassMatch(numbers=found)
    if are_numbers(head) != are_numbers(cache):
        fit = len(cache) <= len(head) if are_numbers(cache) else len(cache) == len(head)
        if numbers_may_have_names and fit:
            return ClassMatch(numbers=None, by_number=True)
        raise UsageError(f"{_kind(head)} cannot be compared with {_kind(cache)}")
    raise UsageError(_differing(head, cache))


def _differing(head: Sequence[str], cache: Sequence[str]) -> str:
    """Return which classes of a cache a head has not, with those that the head alone has."""
    of_head, of_cache = ({*map(_plain, names)} for names in (head, cache))
    lacking = [name for name in cache if _plain(name) not in of_head]
    alone = [name for name in head if _plain(name) not in of_cache]
    if not lacking:
        return "classes of one side have the same name, but for spaces and capitals"
    return f"there is no class {_named(lacking)}" + (f" (but {_named(alone)})" if alone else "")


def _by_names(head: Sequence[str], cache: Sequence[str]) -> np.ndarray | None:
    """Return the head's number of each class of the cache, int64 (C,); None where one has none, or several."""
    for form in (str, _plain):
        names = [form(name) for name in head]
        numbers = {name: number for number, name in enumerate(names)}
        wanted = [form(name) for name in cache]
        if len(numbers) == len(names) and len({*wanted}) == len(wanted) and numbers.keys() >= {*wanted}:
            return np.asarray([numbers[name] for name in wanted], dtype=np.int64)
    return None


def _plain(name: str) -> str:
    return _BETWEEN_WORDS.sub(" ", name).strip().casefold()


def _kind(classes: Sequence[str]) -> str:
    if are_numbers(classes):
        return f"{len(classes)} classes that are numbers"
    return f"{len(classes)} classes with names ({_named(classes)})"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, names[:_MOST_NAMED])) + more
