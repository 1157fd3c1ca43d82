"""What is settled before a run: whether its caches belong together, what it is, and that its directory is free."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.batches import Loader, Source
from evl_cache.canonical_json import json_text
from evl_cache.errors import UsageError
from evl_cache.heads import MODULES, head_class
from evl_cache.notation import format_rows
from evl_cache.precision import check_precision
from evl_cache.processes import Processes
from evl_cache.runs import (
    ALL_CLIPS,
    OnWait,
    RunConfig,
    RunFile,
    RunWriter,
    check_no_others_files,
    check_reads,
    feature_differences,
    match_classes,
    other_sides,
    read_run_config,
    samples_digest,
    whole_file,
    write_run_config,
    writing,
)
from evl_cache.spec import CacheSpec
from evl_cache.store import Reads
from evl_cache.train.again import not_as_it_was
from evl_cache.train.options import OPERATIONAL, TrainOptions

_MOST_CLIPS_NBYTES = 4 << 20  # of a list of clips in `config.json`


def pair_differences(train: CacheSpec, val: CacheSpec) -> list[str]:
    """Why a head that is trained on one cache cannot be validated on the other; empty where it can."""
    differing = feature_differences(train, val)
    try:
        match_classes(train.classes, val.classes)
    except UsageError as error:
        ours, theirs = len(train.classes), len(val.classes)
        counts = f"{ours} classes, not {theirs}" if ours != theirs else "other classes"
        differing.append(
            f"{counts}, matched by name: {error}; each class to validate on must be one to train on: "
            "lists that name their classes otherwise are extracted with one --classes FILE"
        )
    return differing


def check_caches(caches: Sequence[Source], reads: Iterable[Reads]) -> None:
    """Refuse caches of the two sides that do not belong together, or of which one lacks what heads read.

    Whatever trains asks this of both sides alike before its first step: a validation that fails would lose an epoch.

    Args:
        caches: to train on and to validate on.
        reads: what each head reads.

    Raises: UsageError that says why.
    """
    train_cache, val_cache = caches
    differing = pair_differences(train_cache.spec, val_cache.spec)
    if differing:
        raise UsageError(
            f"{train_cache.place} and {val_cache.place} do not belong together: {'; '.join(differing)}"
        )
    for of_head in reads:
        for cache in caches:
            check_reads(of_head, cache)


def run_config(
    cache: Source, loaders: Mapping[str, Loader], options: TrainOptions, layers: tuple[int, ...]
) -> RunConfig:
    """Return what a run on this cache with these options is.

    Args:
        loaders: by side, `train` and `val`.

    Raises: as `head_config`; UsageError for a precision that its device cannot compute in.
    """
    check_precision(options.precision, options.device)
    spec = cache.spec
    caches = {
        name: {
            "path": loader.cache.place,
            "fingerprint": loader.cache.fingerprint,
            "content_id": loader.cache.spec.content_id,
            "clips": _clips(loader),
            "samples": len(loader.samples),
            "sample_nbytes": loader.sample_nbytes,
            "samples_sha256": samples_digest(loader.samples),
        }
        for name, loader in loaders.items()
    }
    return RunConfig(
        head=options.head,
        head_config=head_config(spec, options, layers),
        layers=layers,
        classes=spec.classes,
        features=spec.to_json(),
        training=asdict(options),
        caches=caches,
        tower=_tower(cache, loaders["val"].cache if "val" in loaders else cache),
    )


def _clips(loader: Loader) -> str | None:
    """The clips of a loader, as `config.json` has them: those with features, or `all` if none was left out.

    None where that would be too long: a random part of millions of clips.
    """
    rows = np.flatnonzero(np.bincount(loader.cache.sample_clips[loader.samples]))
    is_all = len(rows) + loader.skipped_clips == len(loader.cache.clips)
    text = ALL_CLIPS if is_all else format_rows(rows.tolist())
    return text if len(text) <= _MOST_CLIPS_NBYTES else None


def head_config(spec: CacheSpec, options: TrainOptions, layers: tuple[int, ...]) -> dict[str, Any]:
    """Return the arguments of a head that reads these layers of a cache.

    Raises: UsageError where a module is switched off that the head does not have.
    """
    has = head_class(options.head).temporal_modules
    foreign = [name for name in MODULES if not getattr(options, name) and name not in has]
    if foreign:
        raise UsageError(
            f"{options.head} has no {', '.join(foreign)} to switch off; it has {', '.join(has) or 'no such module'}"
        )
    return {
        "num_layers": len(layers),
        "width": spec.tower.width,
        "num_frames": spec.views.frames,
        "grid": spec.tower.grid,
        "num_classes": len(spec.classes),
        "num_heads": options.num_heads,
        "dropout": options.dropout,
        **{name: getattr(options, name) for name in has},
    }


def _tower(cache: Source, val: Source) -> dict[str, object] | None:
    names = {name: cache.origin.get(name) for name in ("model", "pretrained")}
    return None if None in names.values() else {**names, "views": val.spec.views.to_json()}


@contextmanager
def written_by_first(out: Path, processes: Processes, on_wait: OnWait) -> Iterator[RunWriter | None]:
    """Make the first process the only writer of a run directory. Returns: the right to write, None in the others.

    Raises: as `writing`, in all processes.
    """
    with ExitStack() as kept:
        found: list[RunWriter] = []

        def begin() -> None:
            found.append(kept.enter_context(writing(out, on_wait=on_wait)))

        processes.on_first(begin, "while taking the run directory")
        yield found[0] if found else None


def prepare_run(out: Path, config: RunConfig, *, resume: bool) -> None:
    """Write a new run's `config.json`, or check that the run to resume is this one.

    Raises: UsageError where a run is there already, or another one is to be resumed.
    """
    if not resume:
        if (out / RunFile.STATE).exists() or (out / RunFile.HEAD).exists():
            raise UsageError(f"{out} holds a run already; use --resume, or another --out")
        check_no_others_files(out)
        for name in (RunFile.METRICS, RunFile.STEPS):
            (out / name).unlink(missing_ok=True)
        write_run_config(out, config)
        model = Path(str((config.tower or {}).get("model", "")))
        if model.suffix == ".json" and model.is_file():
            with whole_file(out / RunFile.TOWER) as staging:  # a run is whole without the file's place
                staging.write_bytes(model.read_bytes())
        return
    before = read_run_config(out)
    mine, theirs = (json.loads(json_text(asdict(c))) for c in (config, before))
    for side in (mine, theirs):
        side["training"] = {k: v for k, v in side["training"].items() if k not in OPERATIONAL}
    theirs["training"].setdefault("order_seed", None)  # runs from before it was an option
    fields = [name for name in ("head", "head_config", "layers", "training") if mine[name] != theirs[name]]
    detail = [n for n in mine["training"] if mine["training"][n] != theirs["training"].get(n)]
    sides = other_sides(theirs["caches"], mine["caches"])
    if fields or sides:
        raise UsageError(
            f"{out}: --resume with other {', '.join(detail or fields or sides)}; use the run's own, or another --out"
        )
    _record_resumption(out, before, config.environment)


def _record_resumption(out: Path, before: RunConfig, now: Mapping[str, Any] | None) -> None:
    """Add to `config.json` what a run goes on with, where that is not what it was begun with."""
    if before.environment is None or now is None or not not_as_it_was(before, now):
        return
    resumed = [*before.environment.get("resumed", []), dict(now)]
    write_run_config(out, replace(before, environment={**before.environment, "resumed": resumed}))
