"""Which class of a head a cache's label means: the one of the same name, and by number only where one side has no names.

H classes of the head, C classes of the cache.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evl_cache.clips import class_numbers
from evl_cache.errors import UsageError

_MOST_NAMED = 3
_NUMBER = re.compile(r"(?P<whole>[-+]?[0-9]+)(?:\.(?:0*|(?P<part>[0-9]+)))?")
_UNDERSCORES = re.compile(r"(?<=[^\s_])_+(?=[^\s_])")
_HYPHENS = re.compile(r"(?<=[^\W_])(?:-+|\s+-+\s+)(?=[^\W_])")
_BLANKS = re.compile(r"\s+")


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

    Spaces, underscores and hyphens between words, capitals, Unicode forms and the point of `1.0` count only where classes
    differ in nothing else. The hyphen of `-1` always counts.

    Args:
        numbers_may_have_names: where one side has names and the other numbers, numbers are compared, if they can be: not
            where a name is a number itself, as of folders 1 to 11, whose order is another.

    Raises: UsageError that says what differs, where the cache has a class that the head has not.
    """
    if tuple(head) == tuple(cache):
        return ClassMatch(numbers=None)
    found = _by_names(head, cache)
    if found is not None:
        return ClassMatch(numbers=found)
    named = cache if are_numbers(head) else head
    if are_numbers(head) != are_numbers(cache) and not any(map(_NUMBER.fullmatch, named)):
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
        return "classes of one side have the same name, but for spaces, capitals and the like"
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
    """Return a name without what people write in several ways; a number stays one, and `1.0` is `1`."""
    text = unicodedata.normalize("NFC", name).strip()
    number = _NUMBER.fullmatch(text)
    if number is not None:
        return text if number["part"] else number["whole"]
    words = _BLANKS.sub(" ", _HYPHENS.sub(" ", _UNDERSCORES.sub(" ", text)))
    return unicodedata.normalize("NFC", words.casefold())


def _kind(classes: Sequence[str]) -> str:
    if are_numbers(classes):
        return f"{len(classes)} classes that are numbers"
    return f"{len(classes)} classes with names ({_named(classes)})"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, names[:_MOST_NAMED])) + more
