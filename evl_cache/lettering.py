"""The letters of a picture: fonts of the system for names that matplotlib's own font does not draw.

matplotlib is loaded only where something is drawn.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from evl_cache.notation import escaped

# Fonts of coloured pictures, which matplotlib cannot draw, and those that have a box for every letter.
_NO_LETTERS = ("emoji", "lastresort")
# The font of each letter that was looked for; None where none has it. All fonts are opened once, and not for every picture.
_FAMILIES: dict[str, str | None] = {}
_log = logging.getLogger("evl_cache")


@dataclass(frozen=True, kw_only=True)
class Lettering:
    """How a picture's texts are drawn.

    Attributes:
        families: fonts, for matplotlib's `font.family`; each draws what those before it do not have.
        missing: letters of the texts that none of them has.
    """

    families: tuple[str, ...]
    missing: frozenset[str]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Lettering":
        """Return the lettering of texts, which are escaped as they are shown. Fonts are looked for only if one is needed."""
        from matplotlib import rcParams

        own = tuple(rcParams["font.family"])
        missing = {letter for text in texts for letter in escaped(text)} - _letters_of_default(own)
        if new := missing - _FAMILIES.keys():
            _look_for(new)
        families = dict.fromkeys(family for letter in sorted(missing) if (family := _FAMILIES[letter]))
        return cls(
            families=(*own, *families),
            missing=frozenset(letter for letter in missing if _FAMILIES[letter] is None),
        )

    def written(self, text: str) -> str:
        """Return one line in which letters that no font has stand as escapes: `\\u5531`."""
        return "".join(_escape(letter) if letter in self.missing else letter for letter in escaped(text))

    def names(self, names: Sequence[str]) -> list[str]:
        """Return names that are told apart: one that no font draws whole by its number, and what of it can be drawn."""
        return [self._numbered(number, escaped(name)) for number, name in enumerate(names)]

    def numbered(self, names: Sequence[str]) -> list[int]:
        """Return which names stand by their numbers."""
        return [number for number, name in enumerate(names) if not self.missing.isdisjoint(escaped(name))]

    def tell(self) -> None:
        """Say once, on stderr unless logging is set up otherwise, that there are letters which no font draws."""
        if self.missing:
            _tell_once()

    def _numbered(self, number: int, name: str) -> str:
        if self.missing.isdisjoint(name):
            return name
        rest = " ".join("".join(letter for letter in name if letter not in self.missing).split())
        return f"#{number} {rest}".rstrip()


@lru_cache(maxsize=1)
def _tell_once() -> None:
    _log.warning(
        "no font of this system has all letters of the names: pictures show numbers or escapes for these; install one that "
        "has them, such as Noto Sans CJK"
    )


def _escape(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode()


@lru_cache(maxsize=4)
def _letters_of_default(families: tuple[str, ...]) -> frozenset[str]:
    from matplotlib.font_manager import FontProperties, findfont

    return _letters(Path(findfont(FontProperties(family=list(families)))))


def _look_for(letters: set[str]) -> None:
    """Find the first font that has each letter, and have matplotlib know it."""
    left = set(letters)
    for path in _system_fonts():
        try:
            found = left & _letters(path)
            family = _family(path) if found else ""
        except (
            Exception
        ) as error:  # as matplotlib does: what a font raises is open-ended, and another may be drawn
            _log.debug("%s: passed over (%s)", path, type(error).__name__)
            continue
        _FAMILIES.update(dict.fromkeys(found, family))
        left -= found
        if not left:
            break
    _FAMILIES.update(dict.fromkeys(left))


def _system_fonts() -> list[Path]:
    """Return files of fonts, plain ones first: where several have a letter, each picture gets the same."""
    from matplotlib.font_manager import findSystemFonts

    paths = [Path(path) for path in findSystemFonts()]
    fitting = [path for path in paths if not any(word in path.name.lower() for word in _NO_LETTERS)]
    return sorted(fitting, key=lambda path: ("regular" not in path.name.lower(), path.name, str(path)))


def _letters(path: Path) -> frozenset[str]:
    from matplotlib.font_manager import get_font

    return frozenset(map(chr, get_font(str(path)).get_charmap()))


def _family(path: Path) -> str:
    """Return the name by which matplotlib finds a font, and have it know the font."""
    from matplotlib.font_manager import fontManager

    known = {entry.fname: entry.name for entry in fontManager.ttflist}
    if str(path) not in known:
        fontManager.addfont(str(path))
        known = {entry.fname: entry.name for entry in fontManager.ttflist}
    return known[str(path)]
