"""What pages say of each other and of the code holds: figures beside links, and the files and modules they name."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.example_data import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# A number with a decimal point or thousands; one of its own, so that 5.6 is not found in 5.65 or 15.6.
NUMBER = re.compile(r"(?<![\d.,])\d[\d,]*(?:\.\d+)?(?![\d]|[.,]\d)")
LINK = re.compile(r"\[([^\[\]]+)\]\(([\w/.-]*\.md)?(?:#[\w-]+)?\)")


def figures(text: str) -> set[str]:
    """The numbers of a text that measure something; small whole ones, as in `ViT-B/16`, are names."""
    found = {number.rstrip(",") for number in NUMBER.findall(text)}
    return {number for number in found if "." in number or "," in number or len(number) > 1}


def linked_figures(page: Path) -> list[tuple[str, Path]]:
    """Each figure inside a link's text, and each in a row of a table whose first cell links, with the page linked."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = [
        (figure, page.parent / target)
        for label, target in LINK.findall(text)
        if target
        for figure in figures(label)
    ]
    for line in text.splitlines():
        cells = line.strip("|").split("|")
        links = [target for _, target in LINK.findall(cells[0]) if target]
        if line.startswith("|") and links:
            values = " ".join(cells[1:])
            found += [(figure, page.parent / target) for figure in figures(values) for target in links]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_figure_beside_a_link_stands_on_the_page_linked(page: Path) -> None:
    missing = [
        f"{figure}: not in {target.name}"
        for figure, target in linked_figures(page)
        if figure not in figures(target.read_text(encoding="utf-8"))
    ]
    assert missing == []


def test_the_figures_of_the_readme_are_looked_for() -> None:
    found = {figure for figure, _ in linked_figures(ROOT / "README.md")}
    assert {"83", "1,877", "641", "24", "177", "5.65", "72.63"} <= found


def test_the_lines_of_the_demo_in_the_readme_are_those_of_the_results() -> None:
    lines = re.findall(r"^top-1 .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    results = figures((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    assert len(lines) == 2
    assert figures("".join(lines)) <= results


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5.65 MB, 1,877 ms and 83", {"5.65", "1,877", "83"}),
        ("93.1, 0.5.", {"93.1", "0.5"}),
        ("a 4-bit code of 8 frames", set()),
    ],
)
def test_figures_of_a_text(text: str, expected: set[str]) -> None:
    assert figures(text) == expected


# Files and modules

ROOMS = {path.name for path in (ROOT / "evl_cache").iterdir() if path.is_dir()}
TOPS = {"evl_cache", "cli", "tests", "tools", "benchmarks", "docs"}
# Names of files that users meet and that begin like a room's.
ENDINGS = {"json", "html", "csv", "toml"}
# Attributes of a stored group, and the file that docs/heads.md has its reader write.
NOT_OURS = {"evl_cache.layers", "evl_cache.frame_difference", "evl_cache/heads/maxpool.py"}


def code_words(page: Path) -> set[str]:
    """What stands in backticks within a line, blocks left out."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", text))


def is_path(word: str) -> bool:
    """Whether it is written as a path into the repository: it begins with a folder of ours, and no command does."""
    return re.fullmatch(r"\w+/[\w/.-]*", word) is not None and word.split("/")[0] in TOPS | ROOMS


def is_module(word: str) -> bool:
    """Whether it is written as a module, or a name in one: `evl_cache.train`, `benchmarks.read`, `runs.head_logits`."""
    first, *rest = word.split(".")
    dotted = re.fullmatch(r"\w+(\.\w+)+", word) is not None
    return dotted and rest[-1] not in ENDINGS and first in TOPS | ROOMS


def path_exists(word: str) -> bool:
    return any((top / word).exists() for top in (ROOT, ROOT / "evl_cache"))


def module_exists(word: str) -> bool:
    """Whether it is a module, or a word of the module before the last dot."""
    first, *rest = word.split(".")
    base = ROOT.joinpath(*([] if first in TOPS else ["evl_cache"]), first, *rest)
    if base.is_dir() or base.with_suffix(".py").is_file():
        return True
    source = base.parent / "__init__.py" if base.parent.is_dir() else base.parent.with_suffix(".py")
    return source.is_file() and re.search(rf"\b{rest[-1]}\b", source.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    words = code_words(page) - NOT_OURS
    assert [word for word in words if is_path(word) and not path_exists(word)] == []
    assert [word for word in words if is_module(word) and not module_exists(word)] == []


@pytest.mark.parametrize(
    ("word", "exists"),
    [
        ("heads/decoder/", True),
        ("tests/test_heads.py", False),
        ("evl_cache/heads/layer_pass.py", False),
        ("runs.head_logits", True),
        ("benchmarks.read", True),
        ("evl_cache.dataset.Loader", False),
        ("train.optimisation.seed_step", True),
    ],
)
def test_dead_names_are_found(word: str, exists: bool) -> None:
    assert is_path(word) != is_module(word)
    assert (path_exists(word) if is_path(word) else module_exists(word)) is exists


def test_tests_and_benchmarks_that_blocks_and_comments_name_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"tests/\w+(?:/\w+)*\.py", text):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
        for name in re.findall(r"python -m ((?:benchmarks|tools)[\w.]*\w)", text):
            assert name == "benchmarks.NAME" or module_exists(name), f"{page.name}: {name}"


def test_pages_and_tests_that_the_code_names_exist() -> None:
    missing = []
    for top in ("evl_cache", "cli", "tools", "benchmarks", "tests"):
        for path in set((ROOT / top).rglob("*.py")) - {Path(__file__)}:
            named = re.findall(
                r"\b(docs/[a-z-]+\.md|tests/[a-z_0-9/]+\.py)\b", path.read_text(encoding="utf-8")
            )
            missing += [f"{path.relative_to(ROOT)}: {name}" for name in named if not (ROOT / name).is_file()]
    assert missing == []


def test_every_page_is_in_the_navigation_and_every_room_on_the_map() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}" not in site] == []
    map_of_rooms = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    rooms = [path.parent for path in (ROOT / "evl_cache").glob("*/__init__.py")]
    assert len(rooms) > 10
    assert [room.name for room in rooms if f"  {room.name}/ " not in map_of_rooms] == []


def test_every_module_beside_the_rooms_is_on_the_map() -> None:
    beside = {path.stem for path in (ROOT / "evl_cache").glob("*.py")} - {"__init__"}
    deprecated = {name for name in beside if "Deprecated names" in _docstring(name)}
    map_of_rooms = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    assert [name for name in beside - deprecated if not re.search(rf"\b{name}\b", map_of_rooms)] == []


def _docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / "evl_cache" / f"{name}.py").read_text())) or ""
