"""Lists as people write them: commas, quotes, labels of several words, numbers with a point, labels that are none."""

import re
from pathlib import Path

import pytest

from evl_cache.clips import number_labels
from evl_cache.datasets.list_file import read_lists
from evl_cache.datasets.list_lines import parse_list, refuse_several_labels
from evl_cache.errors import UsageError
from tests.support.example_data import ROOT

LISTS = ROOT / "tests" / "fixtures" / "lists"


def read(path: Path) -> dict[str, str]:
    """The name of each clip's class, by path."""
    clips = read_lists(path, split="train")["train"]
    return {clip.path: clips.classes[clip.label] for clip in clips.clips}


def test_lists_with_commas_and_labels_of_two_words_are_read() -> None:
    assert read(LISTS / "commas" / "l.txt") == {"my clip.mp4": "3", "b c.mp4": "1"}
    assert read(LISTS / "label-of-two-words" / "l.txt") == {
        "a.mp4": "playing guitar",
        "b.mp4": "playing flute",
    }


def test_numbers_with_a_point_are_numbers() -> None:
    clips = read_lists(LISTS / "labels-as-floats" / "l.txt", split=None)["all"]
    assert [clip.label for clip in clips.clips] == [0, 1, 2, 10]
    assert clips.classes == tuple(str(number) for number in range(11))
    assert number_labels(["2.", "0", "1.00"], source="x", lines=[1, 2, 3])[0] == [2, 0, 1]


@pytest.mark.parametrize(
    "labels", [["0.0e+00", "1.0e+00", "1.0e+01"], ["+0", "+1", "+10"], ["0", "1.", "1e1"]]
)
def test_numbers_are_numbers_however_they_are_written(labels: list[str]) -> None:
    numbers, classes = number_labels(labels, source="x", lines=[1, 2, 3])
    assert (numbers, len(classes)) == ([0, 1, 10], 11)


@pytest.mark.parametrize("odd", ["nan", "None", "walk", "1.0.0"])
@pytest.mark.parametrize("number", ["0.0", "1e+01", "7"])
def test_numbers_beside_names_are_refused_with_their_line(odd: str, number: str) -> None:
    with pytest.raises(
        UsageError, match=rf"x, line 4: label {odd!r} among labels like '{re.escape(number)}'"
    ):
        number_labels([number, number, odd], source="x", lines=[2, 3, 4])


def test_numbers_with_parts_are_no_classes_unless_a_file_names_them() -> None:
    labels = ["0.5", "1.0", "0.25"]
    with pytest.raises(UsageError, match=r"x, line 1: label 0\.5; expected class numbers .* --classes FILE"):
        number_labels(labels, source="x", lines=[1, 2, 3])


@pytest.mark.parametrize("labels", [["walk", "run", "walk run"], ["walk;run", "sit;run"], ["a|b", "b|c"]])
def test_several_names_are_several_labels(labels: list[str], tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    path.write_text("".join(f"{number}.mp4\t{label}\n" for number, label in enumerate(labels)))
    with pytest.raises(UsageError, match=r"are several labels"):
        read_lists(path, split=None)
    (tmp_path / "classes.txt").write_text("\n".join(labels))
    clips = read_lists(path, split=None, classes_path=tmp_path / "classes.txt")["all"]
    assert [clips.classes[clip.label] for clip in clips.clips] == labels


def test_labels_that_are_not_utf8_are_refused_and_paths_are_not(tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    path.write_bytes(b"caf\xe9.mp4 run\n")
    assert read_lists(path, split=None)["all"].clips[0].path == "caf\udce9.mp4"
    path.write_bytes(b"a.mp4 run\nb.mp4 Fu\xdfball\n")
    with pytest.raises(UsageError, match=r"l\.txt, line 2: label 'Fu\\udcdfball' is not UTF-8"):
        read_lists(path, split=None)


def test_further_columns_are_refused_with_how_a_table_names_them() -> None:
    for line in ("a.mp4\t0\t0.5\ttrain", "a.mp4,0,0.5,train"):
        with pytest.raises(UsageError, match=r"has 4 columns .* name the columns in a first line"):
            parse_list(line, source="x")
    with pytest.raises(UsageError, match="may be further columns"):
        parse_list("0.mp4 0 0.5 train", source="x")


@pytest.mark.parametrize("label", ["-1", "-1.0", "-2", "\u22121"])
@pytest.mark.parametrize("others", [[], ["0"], ["run"]])
def test_a_negative_label_is_refused_with_its_line(label: str, others: list[str]) -> None:
    lines = list(range(7, 8 + len(others)))
    with pytest.raises(UsageError, match=f"x, line {lines[-1]}: label {label} is no class"):
        number_labels([*others, label], source="x", lines=lines)


def test_a_list_whose_labels_are_all_minus_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"l\.txt, line 1: label -1 is no class"):
        read(LISTS / "label-minus-one" / "l.txt")


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.mp4,3", "a.mp4", "3"),
        ("a.mp4 , 3", "a.mp4", "3"),
        ("my clip.mp4,playing guitar", "my clip.mp4", "playing guitar"),
        ("a,b c.mp4,3", "a,b c.mp4", "3"),
        ("a, b.mp4 3", "a, b.mp4", "3"),
        ("one.mp4,two.mp4 3", "one.mp4,two.mp4", "3"),
        ("clip.bin,3", "clip.bin", "3"),
        ("my clip.xyz,3", "my clip.xyz", "3"),
        ("clip,3", "clip", "3"),
        ('"my, clip.mp4",3', "my, clip.mp4", "3"),
        ('a.mp4,"eating, drinking"', "a.mp4", "eating, drinking"),
        ("a.mp4\teating, drinking", "a.mp4", "eating, drinking"),
        ("A.MP4 playing the guitar", "A.MP4", "playing the guitar"),
        ("my clip.avi playing the guitar", "my clip.avi", "playing the guitar"),
        ("copy of a.mp4 last.bin 3", "copy of a.mp4 last.bin", "3"),
        ("clip without ending 3", "clip without ending", "3"),
        ("some/folder 299 1", "some/folder 299", "1"),
        ('"0.mp4" 1', "0.mp4", "1"),
        ('"my, clip.mp4"  playing guitar', "my, clip.mp4", "playing guitar"),
        ('"a ""b"".mp4" "eating, drinking"', 'a "b".mp4', "eating, drinking"),
        ('"my clip" 3', "my clip", "3"),
        ('"a.mp4" say "no"', "a.mp4", 'say "no"'),
        ('"a.mp4" , "eat, drink"', "a.mp4", "eat, drink"),
        ('"my.mp4 x" 1', "my.mp4 x", "1"),
        ('"my clip.mp4" , 3', "my clip.mp4", "3"),
        ('a.mp4 "take 3"', "a.mp4", "take 3"),
        ("a.mp4\ttake 3", "a.mp4", "take 3"),
        ("a.mp4,take 3", "a.mp4", "take 3"),
        ("a.mp4 c#", "a.mp4", "c#"),
        ("a.mp4 over 2 bars", "a.mp4", "over 2 bars"),
        ("no.ending, part two 3", "no.ending, part two", "3"),
    ],
)
def test_a_line_is_a_path_and_a_label(line: str, path: str, label: str) -> None:
    (found,) = parse_list(line, source="x")
    assert (found.path, found.label) == (path, label)


@pytest.mark.parametrize("header", ["path,label", "path\tlabel", "Video,Class", "filename label"])
def test_a_first_line_that_names_the_columns_is_no_clip(header: str) -> None:
    (found,) = parse_list(f"{header}\na.mp4,3\n", source="x")
    assert (found.line, found.path, found.label) == (2, "a.mp4", "3")


@pytest.mark.parametrize(
    "line", ["a.mp4 1,3", "a.mp4,1;3", "a.mp4\t1 3", "a.mp4 1 3", "a.mp4 [1, 3]", "a.mp4 1|3", "a.mp4 a,b"]
)
def test_several_labels_are_refused_saying_so(line: str) -> None:
    text = f"y.mp4 a\nz.mp4 b\n{line}\n"
    with pytest.raises(UsageError, match=r"x, line 3: .* are several labels .* expected one label"):
        refuse_several_labels(parse_list(text, source="x"), source="x")


@pytest.mark.parametrize("label", ["cat, dog", "cat ; dog", "cat |dog"])
@pytest.mark.parametrize("mark", ["\t", ","])
def test_several_names_with_blanks_between_are_several_labels(label: str, mark: str) -> None:
    text = f'a.mp4\tcat\nb.mp4\tdog\nc.mp4{mark}"{label}"' if mark == "," else f"a\tcat\nb\tdog\nc\t{label}"
    with pytest.raises(UsageError, match=r"x, line 3: .* are several labels .* --classes FILE"):
        refuse_several_labels(parse_list(text, source="x"), source="x")


@pytest.mark.parametrize(
    "line",
    [
        "0.mp4 train 3",
        "0.mp4 3 train",
        "0.mp4 3, train",
        "0.mp4 train -1",
        "0.mp4 3 # the best",
        "0.mp4 run # the best",
        "0.mp4 run #1",
        '"0.mp4" train 3',
        "0.mp4 take 3",
    ],
)
def test_words_that_may_be_columns_or_a_comment_are_refused_with_the_tab(line: str) -> None:
    with pytest.raises(UsageError, match=r"x, line 1: .* may be further columns .* path<TAB>label") as caught:
        parse_list(line, source="x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ['"Hey" said.mp4 play guitar', '"a.mp4"', '"" 3', '"abc 3', '"a.mp4" ""'])
def test_quotes_that_hold_no_path_before_a_label_are_told(line: str) -> None:
    with pytest.raises(UsageError, match=r"x, line 1: .* quotes; expected .* or path<TAB>label"):
        parse_list(line, source="x")


@pytest.mark.parametrize("line", ["a.mp4,3,train", "a.mp4,1,3", '"a b.mp4",3,train', "a,b,3"])
def test_more_than_two_columns_are_refused_with_a_word_on_the_comma(line: str) -> None:
    with pytest.raises(UsageError, match=r"x, line 1: .* has 3 columns by its commas; expected .* one label"):
        parse_list(line, source="x")


@pytest.mark.parametrize("line", ["a.mp4,", ",3", "a.mp4"])
def test_a_line_without_a_label_says_how_one_is_written(line: str) -> None:
    with pytest.raises(
        UsageError, match="has no label; expected 'path label', 'path<TAB>label' or 'path,label'"
    ):
        parse_list(line, source="x")


def test_a_column_longer_than_any_path_is_told() -> None:
    with pytest.raises(UsageError, match=r"x, line 1: .* cannot be read"):
        parse_list(f'"{"x" * 200_000}",3', source="x")
