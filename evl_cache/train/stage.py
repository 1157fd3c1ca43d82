"""Stage two: a head trained from a cache, without a video or the backbone."""

from dataclasses import replace
from pathlib import Path

from evl_cache.batches import Loader, samples_of_clips, served_samples
from evl_cache.processes import Processes, giving_back_memory, training_environment
from evl_cache.runs import OnWait, RunWriter, load_state, read_run_config
from evl_cache.store import FeatureCache, Indices
from evl_cache.train.batch_size import share_out_memory
from evl_cache.train.head_reads import training_reads
from evl_cache.train.loaders import make_loaders, shuffle_blocks
from evl_cache.train.memory import Loads
from evl_cache.train.options import TrainOptions
from evl_cache.train.result import OnBottleneck, OnNote, OnStep, TrainResult
from evl_cache.train.setup import check_caches, prepare_run, run_config, written_by_first
from evl_cache.train.sides import notes_of_sides
from evl_cache.train.trainer import Trainer

__all__ = ["TrainOptions", "TrainResult", "Trainer", "train", "train_with_loaders"]


@giving_back_memory
def train(
    train_cache: FeatureCache,
    val_cache: FeatureCache,
    *,
    options: TrainOptions,
    out: str | Path,
    train_clips: Indices | None = None,
    val_clips: Indices | None = None,
    resume: bool = False,
    on_step: OnStep = lambda done, total, loss: None,
    on_bottleneck: OnBottleneck = lambda name: None,
    on_wait: OnWait = lambda message: None,
    on_note: OnNote = lambda message: None,
    processes: Processes | None = None,
    command: str | None = None,
) -> TrainResult:
    """Train a head and leave a run directory.

    Args:
        options: how to train.
        out: the run directory.
        train_clips, val_clips: rows of the clip lists, one or several, a slice, or a mask of all clips; all by default.
        resume: go on from the last state in `out`.
        on_step: called with (steps done, steps in all, loss); on a GPU when the next step has been given to it.
        on_bottleneck: called before `on_step` with what training waits for: `device`, `disk` or `processor`.
        on_wait: told once, if it must first be seen whether a writer of `out` on another machine lives.
        on_note: told in a line what training goes on without, such as a CUDA graph that cannot be recorded.
        processes: that train together; this one alone by default.
        command: the command line that called, without credentials; the run records it.

    Raises: UsageError where the caches do not fit each other or the head, where `out` holds a run, or where another
        process writes it; Interrupted where a signal asked to stop, after the state was kept.
    """
    out, processes = Path(out), processes or Processes()
    reads = training_reads(options, train_cache.spec)
    check_caches((train_cache, val_cache), [reads])
    samples = (samples_of_clips(train_cache, train_clips), samples_of_clips(val_cache, val_clips))
    served, _ = served_samples(train_cache, samples[0]), served_samples(val_cache, samples[1])
    with written_by_first(out, processes, on_wait) as writer:
        caches = train_cache, val_cache
        options, kept = share_out_memory(
            options,
            build=lambda: run_config(train_cache, {}, options, reads.layers).build(),
            probe=lambda: train_cache.read_stored(served[:1].tolist(), reads),
            loads=Loads.of(caches, samples, reads),
            recorded=(lambda: read_run_config(out).training.get("batch")) if resume else None,
            processes=processes,
            on_note=on_note,
        )
        blocks = shuffle_blocks(options, train_cache, resumed=out if resume else None)
        options = replace(options, shuffle_blocks=blocks)
        train_loader, val_loader = make_loaders(caches, samples, reads, options, processes, kept_nbytes=kept)
        return train_with_loaders(
            train_loader,
            val_loader,
            layers=reads.layers,
            options=options,
            out=out,
            resume=resume,
            on_step=on_step,
            on_bottleneck=on_bottleneck,
            on_note=on_note,
            processes=processes,
            writer=writer,
            command=command,
        )


def train_with_loaders(
    train_loader: Loader,
    val_loader: Loader,
    *,
    layers: tuple[int, ...],
    options: TrainOptions,
    out: Path,
    resume: bool,
    on_step: OnStep,
    on_bottleneck: OnBottleneck,
    on_note: OnNote = lambda message: None,
    processes: Processes,
    writer: RunWriter | None,
    records_steps: bool = True,
    command: str | None = None,
) -> TrainResult:
    """Train on the batches that loaders give of this process's part. Other arguments and errors as `train`.

    Args:
        layers: what the loaders read.
        options: with a number for the batch.
        writer: the right to write `out`; None in processes that are not the first.
        records_steps: batches have one size and few places, so that a step may be recorded and replayed.
    """
    config = run_config(train_loader.cache, {"train": train_loader, "val": val_loader}, options, layers)
    environment = training_environment(options.device, options.precision, processes.place, command)
    config = replace(config, environment=environment)
    when = "while preparing the run"
    processes.on_first(lambda: prepare_run(out, config, resume=resume), when)
    loaders = train_loader, val_loader
    if processes.place.is_first:
        for note in notes_of_sides([of.cache for of in loaders], [of.samples for of in loaders]):
            on_note(note)
    trainer = Trainer(
        config,
        options,
        train_loader,
        val_loader,
        out=out,
        processes=processes,
        writer=writer,
        on_note=on_note,
        records_steps=records_steps,
    )
    if resume:
        trainer.load(processes.on_first(lambda: load_state(out), when))
    return trainer.run(on_step, on_bottleneck)
