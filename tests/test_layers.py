"""The house stands: imports point down only, each heavy library has one owner, stage two stays light.

The layers are those of docs/architecture.md. A new module is entered here, in its layer, when it is made.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The lowest layer first. A module imports from lower layers, and from its own only where SAME_LAYER allows.
LAYERS: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (layer, frozenset(modules.split()))
    for layer, modules in (
        ("errors", "errors"),
        (
            "pure",
            (
                "spec spec_limits strict_json clips sampling preprocess attention_maps quantize epoch_order train_options"
                " progress displacement notation"
            ),
        ),
        (
            "adapters",
            (
                "video decoding augmentation rendered annotations weights backbone"
                " towers store dataset heads checkpoint official_checkpoint safe_files batches memory resident rendezvous"
                " distributed interruption pictures progress_lines"
            ),
        ),
        (
            "parts of stages",
            (
                "extraction scoring catalog optimisation run_log run_setup head_reads loaders run_tower cluster_costs"
            ),
        ),
        ("made of parts", "run_tables batch_size trainer online_loader"),
        ("stages", "extract train evaluate import_head info watch listing share card sweep"),
        ("reading of stages", "report"),
        ("stage one by name", "extract_dataset"),
        ("composed stages", "demo repair estimate online predict show"),
    )
)
SAME_LAYER = {
    ("dataset", "store"),  # batches are rows of a store
    ("batches", "store"),
    ("dataset", "batches"),
    ("dataset", "resident"),  # which rows are kept is for the loader to use
    ("resident", "store"),
    ("resident", "memory"),
    ("distributed", "rendezvous"),  # which process this is
    ("trainer", "run_tables"),  # the last thing a run does
    ("official_checkpoint", "heads"),
    ("checkpoint", "safe_files"),  # what is loaded is looked at first
    ("official_checkpoint", "safe_files"),
    ("checkpoint", "heads"),  # a checkpoint is a head's parameters
    ("decoding", "video"),  # processes around it
    ("towers", "weights"),  # a tower is built from a weights file
    ("backbone", "towers"),  # and read through its family's adapter
    ("annotations", "rendered"),  # a rendered data set is drawn where it is not there yet
    ("loaders", "head_reads"),  # what is read is what they load
}
FREE_WITHIN = {"pure"}  # small modules of plain values: clips are digested as spec does it

# Heavy libraries and the only modules that know them.
OWNERS: Mapping[str, frozenset[str]] = {
    "decord": frozenset({"video"}),
    "timm": frozenset({"augmentation", "towers"}),
    "torchcodec": frozenset({"video"}),
    "PIL": frozenset({"augmentation"}),
    "av": frozenset({"video", "rendered"}),
    "open_clip": frozenset({"towers"}),
    "zarr": frozenset({"store"}),
    "numcodecs": frozenset({"store"}),
    "awscrt": frozenset({"store"}),
    "obstore": frozenset({"store"}),
    "matplotlib": frozenset({"pictures", "report"}),
    "click": frozenset({"evl_cache_cli"}),
}
PURE_LIBRARIES = {"numpy", "torch"}
MOST_LINES = 350  # of a file; most have fewer than 250


def imports_of(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Dotted names that a module imports anywhere, inside functions too; relative ones made absolute."""
    found: set[str] = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{prefix}.{alias.name}" for alias in node.names)
    return found


def read_tree() -> dict[str, set[str]]:
    """Imports of every module of the package and of the command line, by the module's installed name."""
    tree: dict[str, set[str]] = {}
    for folder, package in (("evl_cache", "evl_cache"), ("cli", "evl_cache_cli")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            tree[name] = imports_of(path.read_text(encoding="utf-8"), name, is_package=is_package)
    return tree


def violations(tree: Mapping[str, Iterable[str]]) -> list[str]:
    """What breaks the house, a line each."""
    return [
        f"{module} imports {name}: {reason}"
        for module, names in sorted(tree.items())
        for name in sorted(names)
        if (reason := _objection(module, name))
    ] + [f"{module}: in no layer of tests/test_layers.py" for module in sorted(tree) if _is_homeless(module)]


def _rank(unit: str) -> int | None:
    return next((rank for rank, (_, units) in enumerate(LAYERS) if unit in units), None)


def _unit(module: str) -> str:
    """`evl_cache.store.shard` -> `store`; the package itself and other packages keep their first name."""
    parts = module.split(".")
    return parts[1] if parts[0] == "evl_cache" and len(parts) > 1 else parts[0]


def _is_homeless(module: str) -> bool:
    return module.startswith("evl_cache.") and _rank(_unit(module)) is None


def _objection(module: str, name: str) -> str | None:
    library = name.split(".")[0]
    unit = _unit(module)
    if library in OWNERS and unit not in OWNERS[library]:
        return f"only {', '.join(sorted(OWNERS[library]))} may know {library}"
    if unit in ("evl_cache", "evl_cache_cli"):  # the package's own list of public names; the command line
        return None
    if library in ("evl_cache_cli", "cli"):
        return "the command line is above the package"
    rank = _rank(unit)
    if rank is None:
        return None  # reported once, as homeless
    if library == "evl_cache":
        return _objection_within(unit, rank, _unit(name))
    if LAYERS[rank][0] in ("errors", "pure") and library not in sys.stdlib_module_names | PURE_LIBRARIES:
        return "a pure module uses the standard library, numpy and torch only"
    return None


def _objection_within(unit: str, rank: int, target: str) -> str | None:
    target_rank = _rank(target)
    if target == "__version__":
        return None
    if target_rank is None:
        return f"{target} is in no layer; public names come from the module that defines them"
    if target_rank < rank or target == unit or (unit, target) in SAME_LAYER:
        return None
    layer, target_layer = LAYERS[rank][0], LAYERS[target_rank][0]
    if layer == target_layer:
        return None if layer in FREE_WITHIN else f"{layer} do not import each other"
    return f"{target_layer} are above {layer}"


def test_imports_point_down_only() -> None:
    tree = read_tree()
    assert "evl_cache.errors" in tree
    assert "evl_cache_cli" in tree
    assert violations(tree) == []


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("evl_cache.sampling", "from evl_cache.video import decode_clip", "adapters are above pure"),
        ("evl_cache.sampling", "def f():\n    from .store import FeatureCache", "adapters are above pure"),
        ("evl_cache.clips", "import pandas", "standard library, numpy and torch only"),
        ("evl_cache.errors", "from evl_cache import spec", "pure are above errors"),
        ("evl_cache.store.shard", "from ..extract import extract", "stages are above adapters"),
        ("evl_cache.heads.evl", "import evl_cache.store", "adapters do not import each other"),
        ("evl_cache.train", "from evl_cache.extract import extract", "stages do not import each other"),
        (
            "evl_cache.extraction.frames",
            "from evl_cache.extract import extract",
            "stages are above parts of stages",
        ),
        ("evl_cache.train", "from evl_cache.demo import run", "composed stages are above stages"),
        ("evl_cache.train", "from evl_cache import EVLHead", "from the module that defines them"),
        ("evl_cache.train", "from evl_cache_cli.main import main", "above the package"),
        ("evl_cache.extract", "import decord", "only video may know decord"),
        ("evl_cache.weights", "def f():\n    import open_clip.model", "only towers may know open_clip"),
        ("evl_cache.dataset", "from numcodecs import zstd", "only store may know numcodecs"),
        ("evl_cache.video_writer", "x = 1", "in no layer"),
        ("evl_cache_cli.main", "import zarr", "only store may know zarr"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, reason: str) -> None:
    (found,) = violations({module: imports_of(source, module)})
    assert found.startswith(module)
    assert reason in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("evl_cache.clips", "from evl_cache.spec import digest"),
        ("evl_cache.dataset", "from evl_cache.store import FeatureCache"),
        ("evl_cache.store.shard", "from .codec import ChunkCodec\nimport numcodecs"),
        ("evl_cache.video", "import torch, decord, av"),
        (
            "evl_cache.extract",
            "from evl_cache import __version__\nfrom .extraction.frames import prepare_clip",
        ),
        ("evl_cache.demo", "from evl_cache.train import train\nfrom evl_cache.extract import extract"),
        ("evl_cache_cli.main", "import click\nfrom evl_cache.train import train"),
        ("evl_cache", "from evl_cache.backbone import Backbone"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, source: str) -> None:
    assert violations({module: imports_of(source, module, is_package=module == "evl_cache")}) == []


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
for name in ("evl_cache.heads", "evl_cache.store", "evl_cache.dataset", "evl_cache.train"):
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


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("```text")[1].split("```")[0]
    named = set(re.findall(r"[a-z_]+", table))
    assert sorted(set().union(*(modules for _, modules in LAYERS)) - named) == []


def test_every_package_folder_is_installed_and_none_is_called_cli() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "evl_cache").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(settings["packages"]) == names | {"evl_cache_cli"}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert settings["package-dir"]["evl_cache_cli"] == "cli"
