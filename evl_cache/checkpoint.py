"""Run directories: what a trained head is, and its weights. safetensors and JSON: data, never code."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evl_cache.errors import UsageError, WeightsError
from evl_cache.heads import Head, build_head
from evl_cache.safe_files import check_archive, check_head_config, read_json_object, safetensors_shapes
from evl_cache.spec import CacheSpec

CONFIG_NAME = "config.json"
HEAD_NAME = "head.safetensors"
BEST_NAME = "best.safetensors"
STATE_NAME = "last.pt"
METRICS_NAME = "metrics.jsonl"
STEPS_NAME = "steps.jsonl"
RESULT_NAME = "result.json"
CONFUSION_NAME = "confusion.csv"
TOWER_NAME = "tower.json"
CLASSES_NAME = "classes.json"
SCORED_NAME = "scored.csv"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run is, as `config.json` holds it.

    Attributes:
        head: name, such as `decoder4`. head_config: arguments of the head's constructor.
        layers: blocks it reads; None for the last ones of whatever cache it is given (imported heads).
        classes: names by label.
        features: the training cache's spec as JSON; None for imported heads.
        training: options of the run.
        caches: `train` and `val`: path and fingerprint.
        tower: `model` and `pretrained` as extract was given them, and the `views` of validation; None where unknown.
    """

    head: str
    head_config: Mapping[str, Any]
    layers: tuple[int, ...] | None
    classes: tuple[str, ...]
    features: Mapping[str, Any] | None
    training: Mapping[str, Any]
    caches: Mapping[str, Any]
    tower: Mapping[str, Any] | None = None

    def build(self) -> Head:
        """A head of this configuration, with new weights."""
        try:
            config = {**self.head_config, "grid": tuple(self.head_config["grid"])}
            return build_head(self.head, **config)
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"{CONFIG_NAME}: no head {str(self.head)[:40]!r} can be built of it ({error!r})"
            ) from error


def write_run_config(run: Path, config: RunConfig) -> None:
    """Create the run directory and its `config.json`."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / CONFIG_NAME, {"format": _FORMAT, **asdict(config)})


def read_run_config(run: Path) -> RunConfig:
    """Raises: UsageError where there is no run."""
    try:
        content = read_json_object(run / CONFIG_NAME)
        if content.pop("format", None) != _FORMAT:
            raise UsageError(f"{run / CONFIG_NAME}: of another format; this evl-cache reads format {_FORMAT}")
        layers = content.pop("layers")
        classes = tuple(content.pop("classes"))
        check_head_config(content["head_config"])
        return RunConfig(layers=None if layers is None else tuple(layers), classes=classes, **content)
    except OSError as error:
        raise UsageError(
            f"{run}: no run there ({error.strerror}); expected a directory that train or import-head wrote"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run / CONFIG_NAME}: not a run's configuration ({error})") from error


def load_head(run: str | Path, *, best: bool = False) -> Head:
    """The trained head of a run directory, in eval mode on the CPU: the last one, or that of its best epoch.

    Raises: UsageError where there is no run; WeightsError where its weights do not belong to it.
    """
    run = Path(run)
    path = run / (BEST_NAME if best else HEAD_NAME)
    config, shapes = read_run_config(run), safetensors_shapes(path)
    with torch.device(
        "meta"
    ):  # of no memory: the file is as large as its tensors, the configuration may say anything
        own = {name: tuple(value.shape) for name, value in config.build().state_dict().items()}
    _check_shapes(own, shapes, source=path)
    head = config.build()
    head.load_state_dict(load_file(path))
    return head.eval()


def load_weights(head: Head, weights: Mapping[str, torch.Tensor], *, source: Path) -> None:
    """Raises: WeightsError where names or shapes are not the head's."""
    _check_shapes(
        {name: tuple(value.shape) for name, value in head.state_dict().items()},
        {name: tuple(value.shape) for name, value in weights.items()},
        source=source,
    )
    head.load_state_dict(weights)


def _check_shapes(
    own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, source: Path
) -> None:
    wrong = [name for name in own.keys() | found.keys() if own.get(name) != found.get(name)]
    if wrong:
        raise WeightsError(
            f"{source}: does not belong to this head ({sorted(wrong)[:3]} missing, extra or misshapen)"
        )


def save_head(run: Path, head: Head, *, best: bool = False) -> None:
    """Write `head.safetensors`, or `best.safetensors`, whole or not at all."""
    name = BEST_NAME if best else HEAD_NAME
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    temporary = run / f".{name}.tmp"
    save_file(tensors, temporary)
    _publish(temporary, run / name)


def save_state(run: Path, state: Mapping[str, Any]) -> None:
    """Write the resumable state: tensors and plain values only, whole or not at all."""
    temporary = run / f".{STATE_NAME}.tmp"
    torch.save(dict(state), temporary)
    _publish(temporary, run / STATE_NAME)


def load_state(run: Path) -> dict[str, Any]:
    """Raises: UsageError where there is none or it is not intact."""
    try:
        check_archive(run / STATE_NAME)
        state: dict[str, Any] = torch.load(run / STATE_NAME, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(
            f"{run}: nothing to resume ({STATE_NAME} is missing); train without --resume"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UsageError(f"{run / STATE_NAME}: cannot be read ({error}); train without --resume") from error
    return state


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON for people, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _publish(temporary, path)


def check_features(config: RunConfig, spec: CacheSpec, *, run: str | Path) -> tuple[int, ...]:
    """The blocks of a cache that a run's head reads.

    Raises: UsageError naming both sides where the cache's features are not those the head was trained on.
    """
    head = config.head_config
    got = {"frames": spec.views.frames, "patches": tuple(spec.tower.grid), "channels": spec.tower.width}
    needs = {"frames": head["num_frames"], "patches": tuple(head["grid"]), "channels": head["width"]}
    differing = [f"{name} {needs[name]}, not {got[name]}" for name in got if got[name] != needs[name]]
    if config.features is not None:
        trained = CacheSpec.from_json(config.features)
        differing += provenance_differences(trained, spec)
    if differing:
        raise UsageError(
            f"{run}: its head needs {'; '.join(differing)} of the cache; extract a cache that fits"
        )
    depth = head["num_layers"]
    wanted = spec.layers[-depth:] if config.layers is None else config.layers
    missing = [layer for layer in wanted if layer not in spec.layers]
    if missing or len(wanted) < depth:
        raise UsageError(
            f"{run}: its head reads {depth} layers {list(wanted)}, the cache has {list(spec.layers)}"
        )
    return tuple(wanted)


def provenance_differences(trained: CacheSpec, other: CacheSpec) -> list[str]:
    """What makes features of two caches not comparable, `needed, not found`; views may differ."""
    pairs = {
        "weights": (trained.tower.weights_sha256[:12], other.tower.weights_sha256[:12]),
        "frames": (trained.views.frames, other.views.frames),
        "sampling": (trained.views.sampling, other.views.sampling),
        "stride": (trained.views.stride, other.views.stride),
        "image size": (trained.tower.image_size, other.tower.image_size),
        "mean": (trained.tower.mean, other.tower.mean),
        "std": (trained.tower.std, other.tower.std),
        "QuickGELU": (trained.tower.quick_gelu, other.tower.quick_gelu),
        "preprocessing": (trained.preprocessing, other.preprocessing),
        "pixels": (trained.pixels, other.pixels),
    }
    return [f"{name} {ours}, not {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def _publish(temporary: Path, final: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
