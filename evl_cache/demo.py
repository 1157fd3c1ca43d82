"""The main job on rendered clips: everything a newcomer needs to see, with nothing to download."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from evl_cache.extract import ExtractOptions, ExtractRequest, Progress, extract_dataset
from evl_cache.rendered import DEFAULT_CLIPS_PER_CLASS, render_demo_motions
from evl_cache.spec import ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.train import TrainOptions, TrainResult, train

SEED = 0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Sizes of the demo. Those of `demo_options` take at most three minutes on two cores.

    Attributes:
        model: the tower; see `build_tower`.
        pretrained: its weights; the model's own where it is None.
        layers: layers of the tower whose tokens are kept.
        clips_per_class: rendered clips by split, for each of eight motions.
        epochs: of both trainings, as what follows.
        batch: clips of a step.
        lr: learning rate.
        warmup_steps: steps over which it rises.
        head: name of the head.
        device: where the tower and the head run.
    """

    model: str = str(files("evl_cache") / "data" / "demo-tower.json")
    pretrained: str | None = "none"
    layers: tuple[int, ...] = (2, 3, 4)
    clips_per_class: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_CLIPS_PER_CLASS))
    epochs: int = 15
    batch: int = 32
    lr: float = 2e-3
    warmup_steps: int = 75
    head: str = "decoder3"
    device: str = "cpu"


# Layers 3 to 5 tell motion better than 6 to 8 (88.8 % against 83.8 % after six epochs), and cost less to extract.
# Fewer epochs, as a step costs more than on the untrained tower's features, which have fewer patches and channels.
TOWERS: Mapping[str, Mapping[str, Any]] = {
    "untrained": {},
    "evl-tiny": {"model": "evl-tiny", "pretrained": None, "layers": (3, 4, 5), "epochs": 10},
}


def demo_options(tower: str, *, device: str) -> DemoOptions:
    """The demo with one of `TOWERS`."""
    return DemoOptions(device=device, **TOWERS[tower])


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found.

    Attributes:
        with_modules: training with the temporal modules.
        without_modules: training without them.
        seconds: duration of each stage, in order.
        classes: how many motions there are to tell apart.
    """

    with_modules: TrainResult
    without_modules: TrainResult
    seconds: Mapping[str, float]
    classes: int


def run_demo(
    directory: str | Path,
    *,
    options: DemoOptions,
    progress: Progress,
    on_step: Callable[[int, int, float], None] = lambda done, total, loss: None,
    on_stage: Callable[[str], None] = lambda name: None,
) -> DemoResult:
    """Render, extract, and train with and without the temporal modules, under a directory.

    Args:
        progress: opens the progress line of a cache.
        on_step: called after each step, as by `train`.
        on_stage: called with the name of each stage that begins.

    Raises: UsageError where the directory holds the runs of another demo.
    """
    directory = Path(directory)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        on_stage(name)
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started

    with stage("render"):
        render_demo_motions(directory / "clips", clips_per_class=options.clips_per_class, seed=SEED)
    with stage("extract"):
        caches = _extract(directory, options, progress)
    results = {}
    for name, modules in (("with", True), ("without", False)):
        with stage(f"train {name} temporal modules"), _one_thread():
            results[name] = train(
                caches["train"],
                caches["val"],
                options=_train_options(options, modules),
                out=directory / "runs" / f"{name}-temporal-modules",
                on_step=on_step,
            )
    return DemoResult(
        with_modules=results["with"],
        without_modules=results["without"],
        seconds=seconds,
        classes=len(caches["train"].spec.classes),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread: the demo's head is so small that several wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _extract(directory: Path, options: DemoOptions, progress: Progress) -> dict[str, FeatureCache]:
    caches = {}
    for split in ("train", "val"):
        request = ExtractRequest(
            dataset="folder",
            root=directory / "clips",
            split=split,
            model=options.model,
            pretrained=options.pretrained,
            layers=options.layers,
            views=ViewSpec(frames=8, stride=1),
            cache=directory / "caches" / split,
        )
        extract_options = ExtractOptions(device=options.device, batch=64)
        for job, _ in extract_dataset(request, options=extract_options, progress=progress):
            caches[split] = FeatureCache(job.cache_path)
    return caches


def _train_options(options: DemoOptions, modules: bool) -> TrainOptions:
    return TrainOptions(
        head=options.head,
        temporal_conv=modules,
        temporal_pos_embed=modules,
        temporal_cross_attention=modules,
        epochs=options.epochs,
        batch=options.batch,
        lr=options.lr,
        warmup_steps=options.warmup_steps,
        seed=SEED,
        device=options.device,
    )
