"""Run directories: what a trained head is, and its weights. safetensors and JSON: data, never code."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from evl_cache.canonical_json import json_text
from evl_cache.errors import NotFinite, UsageError
from evl_cache.heads import Head, build_head
from evl_cache.runs.finite import check_finite, not_finite
from evl_cache.runs.whole_files import whole_file, write_json
from evl_cache.untrusted.head_files import (
    MOST_JSON_NBYTES,
    check_archive,
    check_head_config,
    read_json_object,
)

_FORMAT = 1


class RunFile(StrEnum):
    """The files of a run directory."""

    CONFIG = "config.json"
    HEAD = "head.safetensors"
    BEST = "best.safetensors"
    STATE = "last.pt"
    METRICS = "metrics.jsonl"
    STEPS = "steps.jsonl"
    RESULT = "result.json"
    CONFUSION = "confusion.csv"
    TOWER = "tower.json"
    CLASSES = "classes.json"
    SCORED = "scored.csv"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run is, as `config.json` holds it.

    Attributes:
        head: name, such as `decoder4`.
        head_config: arguments of the head's constructor.
        layers: that it reads; None for the last ones of whatever cache it is given (imported heads).
        classes: names by label.
        features: the training cache's spec as JSON; None for imported heads.
        training: options of the run.
        caches: of `train` and `val` each the path, `fingerprint` and `content_id` of the cache, its `clips` (as
            `format_rows`, or `all`), and number, bytes and digest of their `samples`.
        tower: `model` and `pretrained` as extract was given them, and the `views` of validation; None where unknown.
        environment: what it was begun with: versions, device, threads, processes, precision, command and date, and
            under `resumed` those of continuations where they were others; None in runs of earlier versions.
    """

    head: str
    head_config: Mapping[str, Any]
    layers: tuple[int, ...] | None
    classes: tuple[str, ...]
    features: Mapping[str, Any] | None
    training: Mapping[str, Any]
    caches: Mapping[str, Any]
    tower: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] | None = None

    def sketch(self) -> Head:
        """Return a head of this configuration whose parameters take no memory, to ask for their shapes."""
        with torch.device("meta"):
            return self.build()

    def build(self) -> Head:
        """Return a head of this configuration, with new weights."""
        try:
            config = {**self.head_config, "grid": tuple(self.head_config["grid"])}
            return build_head(self.head, **config)
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"{RunFile.CONFIG}: no head {str(self.head)[:40]!r} can be built of it ({error!r})"
            ) from error


def write_run_config(run: Path, config: RunConfig) -> None:
    """Create the run directory, if it is not there, and its `config.json`."""
    run.mkdir(parents=True, exist_ok=True)
    content = {"format": _FORMAT, **asdict(config)}
    _check_readable(run / RunFile.CONFIG, content)
    write_json(run / RunFile.CONFIG, content)


def _check_readable(path: Path, content: Mapping[str, Any]) -> None:
    """Check that a configuration will be read again. Raises: UsageError, before a run is trained."""
    nbytes = len(json_text(content, indent=2)) + 1
    if nbytes > MOST_JSON_NBYTES:
        raise UsageError(
            f"{path} would have {nbytes} bytes, and no reader takes more than {MOST_JSON_NBYTES}: its classes have long "
            "names, or are many"
        )
    try:
        if not isinstance(environment := content.get("environment"), dict | None):
            raise ValueError(f"environment holds {str(environment)[:40]!r}, expected an object")
        check_head_config(content["head_config"])
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path}: no head of this could be read again ({error})") from error


def check_no_others_files(out: Path) -> None:
    """Check that a directory where a run is to be written has no file of others under a run's names.

    Raises: UsageError naming one.
    """
    found = [name for name in RunFile if (out / name).exists()]
    if not found:
        return
    try:
        read_run_config(out)  # left by a run that was killed at its start
    except UsageError as error:
        raise UsageError(
            f"{out / found[0]} is there, and is no file of a run; choose another --out"
        ) from error


def read_run_config(run: str | Path) -> RunConfig:
    """Read a run's `config.json`. Raises: UsageError where there is no run."""
    run = Path(run)
    try:
        content = read_json_object(run / RunFile.CONFIG)
        if content.pop("format", None) != _FORMAT:
            raise UsageError(
                f"{run / RunFile.CONFIG}: of another format; this evl-cache reads format {_FORMAT}"
            )
        layers = content.pop("layers")
        classes = tuple(content.pop("classes"))
        for part in (content["training"], content["caches"], *content["caches"].values()):
            if not isinstance(part, dict):
                raise ValueError(f"training and caches hold {str(part)[:40]!r}, expected objects")
        if not isinstance(environment := content.get("environment"), dict | None):
            raise ValueError(f"environment holds {str(environment)[:40]!r}, expected an object")
        check_head_config(content["head_config"])
        if content["head_config"].get("num_classes", len(classes)) != len(classes):
            raise ValueError(
                f"it names {len(classes)} classes, and its head has {content['head_config']['num_classes']}"
            )
        return RunConfig(layers=None if layers is None else tuple(layers), classes=classes, **content)
    except OSError as error:
        raise UsageError(
            f"{run}: no run there ({error.strerror}); expected a directory that train or import-head wrote"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run / RunFile.CONFIG}: not a run's configuration ({error})") from error


def save_state(run: Path, state: Mapping[str, Any]) -> None:
    """Write the resumable state: tensors and plain values only, whole or not at all.

    Raises: NotFinite for one that holds NaN or infinite values; what was there stays.
    """
    check_finite(state, run / RunFile.STATE)
    with whole_file(run / RunFile.STATE) as staging, staging.open("wb") as file:
        torch.save(dict(state), file)


def load_state(run: str | Path) -> dict[str, Any]:
    """Read the resumable state.

    Raises: UsageError where there is none or it is not intact; NotFinite where it is of a run that had diverged, as
        versions before this guard wrote it.
    """
    run = Path(run)
    try:
        check_archive(run / RunFile.STATE)
        state: dict[str, Any] = torch.load(run / RunFile.STATE, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(
            f"{run}: nothing to resume ({RunFile.STATE} is missing); train without --resume"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UsageError(
            f"{run / RunFile.STATE}: cannot be read ({error}); train without --resume"
        ) from error
    if (found := not_finite(state)) is not None:
        raise NotFinite(
            f"{run / RunFile.STATE}: {found} is NaN or infinite, as that run had diverged: nothing can go on from there; "
            "train anew with another --out, and a lower --lr"
        )
    return state
