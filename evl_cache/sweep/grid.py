"""The trainings of a sweep: products of options with several values, from a TOML file or the command line.

```toml
epochs = 20                     # of all
[[grid]]                        # every combination
head = ["decoder1", "decoder4"]
temporal = ["all", "none"]
seed = [0, 1, 2]
[[grid]]
head = ["linear", "mlap"]
lr = [1e-3, 3e-4]
```
"""

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from evl_cache.errors import UsageError
from evl_cache.heads import MODULES, has_module
from evl_cache.notation import layers_of, parse_layers
from evl_cache.train import DEFAULT_EPOCHS, OPERATIONAL, TrainOptions

_SHORT = {name.removeprefix("temporal_").replace("_", "-"): name for name in MODULES}
# Values of `temporal`: modules that are on.
TEMPORAL: Mapping[str, frozenset[str]] = {
    "all": frozenset(MODULES),
    "none": frozenset(),
    **{short: frozenset({name}) for short, name in _SHORT.items()},
    **{f"no-{short}": frozenset(MODULES) - {name} for short, name in _SHORT.items()},
}
# The order of the clips is one for all, so that they can share their batches.
_FIXED = OPERATIONAL | {"order_seed"}
_OPTIONS = {field.name: field.type for field in fields(TrainOptions) if field.name not in _FIXED}
AXES = (*_OPTIONS, "temporal")


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One training of a sweep.

    Attributes:
        name: its head and the options that differ between runs; a directory's name too.
        group: the name without the seed; runs of a group are averaged.
        options: of the training.
    """

    name: str
    group: str
    options: TrainOptions


def read_grid(path: Path) -> list[dict[str, Any]]:
    """Read the grids of a TOML file; what stands above the first `[[grid]]` belongs to all of them.

    Raises: UsageError where it is no such file.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as TOML ({error})") from error
    grids = content.pop("grid", [{}])
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise UsageError(f"{path}: grid is {grids!r}; expected tables that begin with [[grid]]")
    return [{**content, **grid} for grid in grids]


def expand(grids: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> list[SweepRun]:
    """Return a run for every combination of every grid, once, in order.

    A switch of a module that a head lacks makes no other run.

    Args:
        grids: values, or lists of values, by axis.
        common: options that are the same for all, such as the device.

    Raises: UsageError for an unknown axis or a value that cannot be.
    """
    found: dict[TrainOptions, None] = {}
    for grid in grids:
        axes = {name: _values(name, value) for name, value in grid.items()}
        for combination in itertools.product(*axes.values()):
            chosen = dict(zip(axes, combination, strict=True))
            found[_options(chosen, common)] = None
    if not found:
        raise UsageError("a sweep of no run; give every axis at least one value")
    # One order for all: that of the first run's seed.
    seed = next(iter(found)).seed
    ordered = [TrainOptions(**{**vars(options), "order_seed": seed}) for options in found]
    return _named(ordered)


def _options(chosen: Mapping[str, Any], common: Mapping[str, Any]) -> TrainOptions:
    values = {**common, **chosen}
    on = TEMPORAL[values.pop("temporal")] if "temporal" in values else None
    for module in MODULES:
        if on is not None:
            values[module] = module in on
        if not has_module(values.get("head", TrainOptions.head), module):
            values.pop(module, None)
    if values.get("epochs") is None and values.get("steps") is None:
        values["epochs"] = DEFAULT_EPOCHS
    options = TrainOptions(**values)
    if options.batch == "auto":
        raise UsageError("batch auto is for a single training; give a sweep a number")
    return options


def _values(name: str, given: Any) -> list[Any]:
    if name not in AXES:
        raise UsageError(f"unknown axis {name!r} of a sweep; expected one of {', '.join(AXES)}")
    values = given if isinstance(given, list) else [given]
    if name == "head_layers" and values and all(isinstance(value, int) for value in values):
        values = [values]  # one choice of layers, written as TOML writes it
    return [_value(name, value) for value in values]


def _value(name: str, value: Any) -> Any:
    """Return a value as TrainOptions takes it. Raises: UsageError for another type."""
    if name == "temporal":
        if not isinstance(value, str) or value not in TEMPORAL:
            raise UsageError(f"temporal {value!r}; expected one of {', '.join(TEMPORAL)}")
        return value
    if name == "head_layers":
        return parse_layers(value) if isinstance(value, str) else layers_of(value)
    kind = str(_OPTIONS[name])
    expected = next(k for k in (bool, float, int, str) if k.__name__ in kind)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not expected and not (name == "batch" and value == "auto"):
        raise UsageError(f"{name} is {value!r}; expected {expected.__name__}")
    return value


def _named(runs: Sequence[TrainOptions]) -> list[SweepRun]:
    """Name each run by its head and what differs between runs, the seed last."""
    differing = [
        name
        for name in _OPTIONS
        if name not in ("head", "seed", *MODULES) and len({getattr(options, name) for options in runs}) > 1
    ]
    several_seeds = len({options.seed for options in runs}) > 1
    named = []
    for options in runs:
        parts = [options.head, *_temporal_name(options)]
        parts += [f"{name}={_text(getattr(options, name))}" for name in differing]
        group = " ".join(parts)
        name = f"{group} seed={options.seed}" if several_seeds else group
        named.append(SweepRun(name=re.sub(r"[^\w.=+,-]+", "_", name), group=group, options=options))
    return named


def _temporal_name(options: TrainOptions) -> list[str]:
    on = frozenset(module for module in MODULES if getattr(options, module))
    has = frozenset(module for module in MODULES if has_module(options.head, module))
    if on >= has:
        return []
    known = (name for name, modules in TEMPORAL.items() if modules == on)
    if has == frozenset(MODULES):
        return [f"temporal={next(known)}"]
    return [f"no-{short}" for short, module in _SHORT.items() if module in has - on]


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):  # briefly, unless other values would have the same name
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)
