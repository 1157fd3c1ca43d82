"""Names that matplotlib's own font does not draw: a font of the system, else numbers and escapes, never boxes."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.font_manager import FontManager

from evl_cache import lettering as fonts
from evl_cache.lettering import Lettering
from evl_cache.report.plots import _confusion, _matplotlib, as_bytes
from evl_cache.show.picture import ViewPicture, draw_view

# Scripts of the fixture and others: letters that no font below has, one name of them beside Latin, emoji.
NAMES = ["唱歌", "打鼓", "عزف العود", "🎻 violin", "바이올린", "plain", "$x^2$ _{", "two\nlines"]
STIX = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "STIXGeneral.ttf"


@pytest.fixture(autouse=True)
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files of the system's fonts: none, unless a test adds one. Only matplotlib's own is sure to be anywhere."""
    found: list[str] = []
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: found)
    monkeypatch.setattr(fonts, "_FAMILIES", {})
    fonts._tell_once.cache_clear()
    yield found
    fonts._tell_once.cache_clear()


def only_in_stix() -> str:
    """A letter that a second font has, and matplotlib's own has not."""
    own = Lettering.of(["a"]).families
    letters = fonts._letters(STIX) - fonts._letters_of_default(own)
    return min(letter for letter in letters if letter.isprintable())


def test_plain_names_are_drawn_as_they_are_and_no_font_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_system_fonts", lambda: pytest.fail("fonts are looked for"))
    lettering = Lettering.of(["run", "größe", "бег"])
    assert lettering.names(["run", "größe", "бег"]) == ["run", "größe", "бег"] and not lettering.missing


def test_a_font_of_the_system_that_has_the_letters_is_taken(system: list[str]) -> None:
    letter = only_in_stix()
    assert Lettering.of([letter]).missing == {letter}
    fonts._FAMILIES.clear()
    system.append(str(STIX))
    lettering = Lettering.of([f"a{letter}"])
    assert lettering.families[-1] == "STIXGeneral" and not lettering.missing
    assert lettering.names([f"a{letter}"]) == [f"a{letter}"] == [lettering.written(f"a{letter}")]


def test_a_file_that_is_no_font_is_passed_over(system: list[str], tmp_path: Path) -> None:
    (tmp_path / "a-regular.ttf").write_bytes(b"no font")
    system += [str(tmp_path / "a-regular.ttf"), str(STIX)]
    assert Lettering.of([only_in_stix()]).families[-1] == "STIXGeneral"


def test_a_font_that_matplotlib_does_not_take_is_passed_over(
    system: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a font of bitmaps, whose letters can be listed."""
    letter, add = only_in_stix(), FontManager.addfont

    def refusing(self: FontManager, path: str) -> None:
        if Path(path).parent == tmp_path:
            raise NotImplementedError("Non-scalable fonts are not supported")
        add(self, path)

    monkeypatch.setattr(FontManager, "addfont", refusing)
    shutil.copy(STIX, tmp_path / "a-regular.ttf")
    system += [str(tmp_path / "a-regular.ttf"), str(STIX)]
    lettering = Lettering.of([letter])
    assert lettering.families[-1] == "STIXGeneral" and not lettering.missing


def test_the_fonts_are_opened_once_for_the_letters_of_many_pictures(
    system: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    letter, opened, letters = only_in_stix(), [], fonts._letters
    monkeypatch.setattr(fonts, "_letters", lambda path: opened.append(path) or letters(path))
    system += [str(STIX)] * 300
    found = [Lettering.of([f"violin 🎻{letter}"]) for _ in range(3)]
    assert len({each.families for each in found}) == 1 and found[0].missing == {"🎻"}
    assert len(opened) <= 301  # matplotlib's own once


def test_names_that_no_font_draws_are_told_apart_by_their_numbers() -> None:
    lettering = Lettering.of(NAMES)
    assert lettering.names(NAMES) == [
        "#0",
        "#1",
        "عزف العود",
        "#3 violin",
        "#4",
        "plain",
        "$x^2$ _{",
        "two\\nlines",
    ]
    assert lettering.numbered(NAMES) == [0, 1, 3, 4]
    assert lettering.written("唱歌/1.mp4") == "\\u5531\\u6b4c/1.mp4"


def test_it_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="evl_cache"):
        Lettering.of(["plain"]).tell()
        assert not caplog.text
        Lettering.of(NAMES).tell()
        Lettering.of(["打鼓"]).tell()
    assert caplog.text.count("no font of this system") == 1


@pytest.mark.parametrize("kind", ["svg", "png"])
@pytest.mark.parametrize("with_font", [True, False])
def test_a_confusion_matrix_is_drawn_without_a_warning_of_a_letter(
    system: list[str], kind: str, with_font: bool
) -> None:
    names = [*NAMES, only_in_stix()]
    if with_font:
        system.append(str(STIX))
    lettering = Lettering.of(names)
    with _matplotlib().rc_context({"font.family": lettering.families, "text.parse_math": False}):
        figure = _confusion(np.eye(len(names), dtype=np.int64), lettering.names(names))
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(set(shown)) == len(names) and shown[-1] == (names[-1] if with_font else f"#{len(NAMES)}")
    assert len(as_bytes(figure, kind)) > 1000  # warnings are errors here


def test_a_view_is_drawn_without_a_warning_of_a_letter(tmp_path: Path) -> None:
    picture = ViewPicture(
        title="唱歌/1.mp4",
        subtitle="label 唱歌   said 打鼓 $",
        frames=None,
        frame_names=["frame 0"],
        grid=(2, 2),
        motion=None,
        attention=None,
        notes=["바이올린"],
    )
    draw_view(picture, tmp_path / "view.png")
    assert (tmp_path / "view.png").stat().st_size > 1000
