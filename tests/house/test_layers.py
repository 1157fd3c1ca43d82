"""The house stands: rooms import as the table says, no two modules import each other, stage two stays light.

A room is a folder of evl_cache/ (those of store/ too); the modules beside the rooms are `pure`, and `cli` is the command
line. A new module needs no line here, a new room has one. docs/architecture.md prints this table.
"""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support.example_data import ROOT

ROOMS = """
room           may import, beside errors and (below it) pure                      only it knows
errors
untrusted
cpu_codes                                                                         llvmlite numba
pure           cpu_codes untrusted
lettering                                                                         matplotlib
rendered                                                                          av
datasets       rendered
processes
video                                                                             av decord torchcodec
towers                                                                            huggingface_hub open_clip timm
heads                                                                             triton
store/disk                                                                        awscrt
store/objects  store/disk                                                         boto3 botocore certifi urllib3
store/shards   store/disk                                                         numcodecs
store/format   cpu_codes store/disk store/objects store/shards untrusted
store/reading  store/disk store/format store/objects store/shards
store/writing  store/disk store/format store/shards
store/copying  store/disk store/format store/objects store/reading store/writing
store/proving  store/disk store/format store/objects store/shards store/writing
store          store/* untrusted
batches        processes store
runs           batches heads store untrusted
train          batches heads processes runs store
sweep          batches heads processes runs store train
report         lettering runs sweep                                               matplotlib
caches         store train
extract        caches datasets processes store towers video                       PIL timm
live           batches datasets extract processes runs store towers train video
show           extract heads lettering live runs store video                      matplotlib
demo           extract rendered store train
cli            *                                                                  click
"""
COMMON_LIBRARIES = {"numpy", "safetensors", "torch", "tqdm"}
DOORS = (
    "evl_cache.video.pool",
)  # of rooms that give names out: this one starts processes, so it is asked for by name
MOST_ROOM_LINES = 40
MOST_MODULES_BESIDE_ROOMS = 16
MOST_LINES = 350  # of a file; most have fewer than 250
# Names that were public before the rooms were built.
DEPRECATED = {"dataset": "batches", "scoring": "runs"}


def parse_rooms(table: str) -> dict[str, tuple[set[str], set[str]]]:
    """Room -> what it may import, and libraries, by the columns that the first line begins."""
    head, *lines = table.strip().splitlines()
    second, third = head.index("may import"), head.index("only it knows")
    return {
        line[:second].strip(): (set(line[second:third].split()), set(line[third:].split())) for line in lines
    }


PACKAGE = ROOT / "evl_cache"
RULES = parse_rooms(ROOMS)


def room_of(module: str) -> str:
    """`evl_cache.store.disk.locks` -> `store/disk`, `evl_cache.clips` -> `pure`, and `` for the package itself."""
    first, *parts = module.removesuffix(".__init__").split(".")
    if first in ("evl_cache_cli", "cli"):
        return "cli"
    if not parts or parts[0] in DEPRECATED:
        return ""
    if "/".join(parts[:2]) in RULES:
        return "/".join(parts[:2])
    if (PACKAGE / f"{parts[0]}.py").is_file():
        return parts[0] if parts[0] in RULES else "pure"
    return parts[0] if len(parts) > 1 or (PACKAGE / parts[0]).is_dir() else ""


def read_tree() -> dict[str, str]:
    """Source of every module of the package and of the command line; a room's own ends in `.__init__`."""
    tree: dict[str, str] = {}
    for folder, package in (("evl_cache", "evl_cache"), ("cli", "evl_cache_cli")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            tree[".".join(parts)] = path.read_text(encoding="utf-8")
    return tree


def imports_of(source: str, module: str) -> set[str]:
    """Modules and names that a module imports anywhere, inside functions too; relative ones made absolute."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{prefix}.{alias.name}" for alias in node.names)
    return found


def violations(tree: Mapping[str, str]) -> list[str]:
    """What breaks the house, a line each."""
    return [
        f"{module} imports {name}: {reason}"
        for module, source in sorted(tree.items())
        for name in sorted(imports_of(source, module))
        if (reason := _objection(room_of(module), name))
    ]


def _objection(room: str, name: str) -> str | None:
    library, last = name.split(".")[0], name.rpartition(".")[2]
    if library in ("evl_cache", "evl_cache_cli", "cli"):
        if last.startswith("_") and not last.endswith("__"):
            return f"{last} is its module's own"
        return _objection_to_room(room, name)
    owners = [owner for owner, (_, libraries) in RULES.items() if library in libraries]
    if owners and room not in owners:
        return f"only {', '.join(owners)} may know {library}"
    if not owners and library not in sys.stdlib_module_names | COMMON_LIBRARIES:
        return f"no room of the table knows {library}"
    return None


def allowed_rooms(room: str) -> set[str]:
    """Rooms that a room may import; `pure` is for those below it in the table."""
    below = list(RULES)[list(RULES).index("pure") :]
    return RULES.get(room, (set(), set()))[0] | {"errors"} | ({"pure"} if room in below else set())


def _objection_to_room(room: str, name: str) -> str | None:
    target, allowed = room_of(name), allowed_rooms(room)
    if room == "" or target == room or name == "evl_cache.__version__":
        return None
    if target == "":
        return "public names come from the room that defines them"
    if target not in allowed and "*" not in allowed and not _is_inside(target, allowed):
        return f"{room} may not import {target}"
    if room == "cli" or name.startswith(DOORS) or room.partition("/")[0] == target.partition("/")[0]:
        return None
    return _objection_to_drawer(target, name)


def _objection_to_drawer(target: str, name: str) -> str | None:
    """A room whose `__init__` gives names out is entered through it; one that gives none is a corridor of doors."""
    path = PACKAGE / target
    gives = path.is_dir() and "\nfrom evl_cache." in (path / "__init__.py").read_text(encoding="utf-8")
    inside = name.split(".")[2 + target.count("/") :]
    is_drawer = len(inside) > 1 or (
        inside and any((path / f"{inside[0]}{end}").exists() for end in ("", ".py"))
    )
    return f"{target} gives its names out: import from the room" if gives and is_drawer else None


def _is_inside(room: str, patterns: Iterable[str]) -> bool:
    return any(pattern.endswith("/*") and room.startswith(pattern[:-1]) for pattern in patterns)


def graph_of(tree: Mapping[str, str], name_of: Callable[[str], str]) -> dict[str, set[str]]:
    """What imports what: modules, or rooms, by `name_of` a module."""
    modules = {module.removesuffix(".__init__"): module for module in tree}
    graph: dict[str, set[str]] = {}
    for module, source in tree.items():
        own = name_of(module.removesuffix(".__init__"))
        names = imports_of(source, module)
        found = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys()
        graph.setdefault(own, set()).update({name_of(name) for name in found - {"evl_cache"}} - {own})
    return graph


def test_rooms_import_as_the_table_says() -> None:
    tree = read_tree()
    assert violations(tree) == []
    rooms = graph_of(tree, room_of)
    assert rooms.keys() - {""} == set(RULES)
    unused = {room: allowed - rooms[room] for room, (allowed, _) in RULES.items()}
    assert {room: names for room, names in unused.items() if names - {"*", "store/*"}} == {}


@pytest.mark.parametrize("name_of", [str, room_of])
def test_no_two_modules_and_no_two_rooms_import_each_other(name_of: Callable[[str], str]) -> None:
    tree = read_tree()
    assert "evl_cache.store.disk.locks" in tree
    assert "evl_cache_cli.__init__" in tree
    TopologicalSorter(graph_of(tree, name_of)).prepare()  # raises CycleError, which names the circle
    tree["evl_cache.errors"] += "\nfrom evl_cache.untrusted import spec_limits\n"
    with pytest.raises(CycleError):
        TopologicalSorter(graph_of(tree, name_of)).prepare()


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("evl_cache.sampling", "from evl_cache.video import decode_clip", "pure may not import video"),
        ("evl_cache.sampling", "def f():\n    from .store import FeatureCache", "pure may not import store"),
        ("evl_cache.clips", "import pandas", "no room of the table knows pandas"),
        ("evl_cache.store.shards.shard", "from evl_cache.extract import extract", "may not import extract"),
        (
            "evl_cache.store.disk.locks",
            "from ..format.marks import Mark",
            "store/disk may not import store/format",
        ),
        ("evl_cache.store.disk.locks", "import evl_cache.store.verify", "store/disk may not import store"),
        ("evl_cache.heads.decoder.evl", "import evl_cache.store", "heads may not import store"),
        ("evl_cache.train.stage", "from evl_cache.extract import extract", "train may not import extract"),
        ("evl_cache.train.stage", "from evl_cache import EVLHead", "from the room that defines them"),
        ("evl_cache.train.stage", "from evl_cache_cli.main import main", "train may not import cli"),
        ("evl_cache.train.stage", "from evl_cache.runs.log import RunLog", "import from the room"),
        (
            "evl_cache.train.stage",
            "from evl_cache.store.format.marks import Mark",
            "may not import store/format",
        ),
        ("evl_cache.extract.stage", "import decord", "only video may know decord"),
        ("evl_cache.runs.fit", "def f():\n    import open_clip.model", "only towers may know open_clip"),
        ("evl_cache.batches.batch", "from numcodecs import zstd", "only store/shards may know numcodecs"),
        ("evl_cache.attic.chest", "from evl_cache.store import FeatureCache", "may not import store"),
        ("evl_cache_cli.main", "import numcodecs", "only store/shards may know numcodecs"),
        ("evl_cache.train.__init__", "from ..extract import extract", "train may not import extract"),
        ("evl_cache.train.stage", "import evl_cache.runs.log as log", "import from the room"),
        ("evl_cache.train.stage", "from evl_cache.runs import log", "import from the room"),
        ("evl_cache.train.stage", "from evl_cache.runs import _secret", "its module's own"),
        ("evl_cache.train.stage", "from tests.support import servers", "no room of the table knows tests"),
        ("evl_cache.extract.stage", "from evl_cache.runs.video.pool import x", "extract may not import runs"),
        (
            "evl_cache.untrusted.json_text",
            "from evl_cache.notation import x",
            "untrusted may not import pure",
        ),
        ("evl_cache.errors", "from evl_cache import spec", "errors may not import pure"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, reason: str) -> None:
    (found,) = violations({module: source})
    assert found.startswith(module)
    assert reason in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("evl_cache.clips", "from evl_cache.canonical_json import digest"),
        ("evl_cache.batches.feature_loader", "from evl_cache.store import FeatureCache"),
        ("evl_cache.store.shards.shard", "from .codec import ChunkCodec\nimport numcodecs"),
        ("evl_cache.store.verify", "from evl_cache.store.format.marks import Mark"),
        ("evl_cache.video.with_pyav", "import torch, decord, av"),
        (
            "evl_cache.extract.stage",
            "from evl_cache import __version__\nfrom evl_cache.video.pool import DecodePool",
        ),
        ("evl_cache.extract.stage", "from evl_cache.caches.places import cache_root"),
        ("evl_cache.train.__init__", "from .options import TrainOptions\nfrom ..runs import load_head"),
        ("evl_cache.demo", "from evl_cache.train import train\nfrom evl_cache.extract import extract"),
        ("evl_cache_cli.main", "import click\nfrom evl_cache.train.options import TrainOptions"),
        ("evl_cache", "from evl_cache.towers import Backbone"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, source: str) -> None:
    assert violations({module: source}) == []


def test_the_table_is_short_and_the_architecture_page_prints_it() -> None:
    assert len(ROOMS.strip().splitlines()) <= MOST_ROOM_LINES
    assert ROOMS.strip() in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_few_modules_lie_beside_the_rooms_and_every_room_says_what_it_is_for() -> None:
    beside = {path.stem for path in (ROOT / "evl_cache").glob("*.py")} - DEPRECATED.keys()
    assert len(beside) <= MOST_MODULES_BESIDE_ROOMS
    rooms = [path for path in (ROOT / "evl_cache").rglob("*/") if list(path.glob("*.py"))]
    assert [room for room in rooms if not (room / "__init__.py").read_text().startswith('"""')] == []


def test_no_file_is_longer_than_one_noun_needs() -> None:
    files = [path for folder in ("evl_cache", "cli") for path in sorted((ROOT / folder).rglob("*.py"))]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lengths) > 100
    too_long = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MOST_LINES]
    assert too_long == []


def _run(code: str) -> list[str]:
    """Words that a fresh interpreter prints on the last line of stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.strip().splitlines()[-1].split()


def test_stage_two_loads_neither_decord_nor_open_clip() -> None:
    code = """
import importlib, sys
loaded = []
for name in ("evl_cache.heads", "evl_cache.store", "evl_cache.batches", "evl_cache.train"):
    importlib.import_module(name)
    loaded += [f"{name}:{heavy}" for heavy in ("decord", "open_clip") if heavy in sys.modules]
print("loaded", *loaded, file=sys.stderr)
"""
    assert _run(code) == ["loaded"]


def test_help_of_the_command_line_loads_no_torch() -> None:
    code = """
import sys
sys.argv = ["evl-cache", "--help"]
from evl_cache_cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = ("torch", "open_clip", "decord", "zarr", "av")
print("loaded", *(name for name in heavy if name in sys.modules), file=sys.stderr)
"""
    assert _run(code) == ["loaded"]


def test_every_package_folder_is_installed_and_none_is_called_cli() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "evl_cache").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(settings["packages"]) == names | {"evl_cache_cli"}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert settings["package-dir"]["evl_cache_cli"] == "cli"


@pytest.mark.parametrize(("old", "new"), DEPRECATED.items())
def test_deprecated_modules_still_give_their_names(old: str, new: str) -> None:
    code = (
        f"import sys, warnings, importlib; warnings.simplefilter('error', ImportWarning)\n"
        f"with warnings.catch_warnings(record=True) as told:\n"
        f"    warnings.simplefilter('always'); old = importlib.import_module('evl_cache.{old}')\n"
        f"new = importlib.import_module('evl_cache.{new}')\n"
        f"assert old.__all__ and all(getattr(old, n) is getattr(new, n) for n in old.__all__)\n"
        f"print(*(w.category.__name__ for w in told if 'evl_cache.{new}' in str(w.message)), file=sys.stderr)"
    )
    assert _run(code) == ["DeprecationWarning"]
