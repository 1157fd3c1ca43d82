"""Many block takers on one disk, in a simulated world: deaths, pauses, slow disks, duplicates, by seed.

The taking code is the real one: `BlockTaker`, `LockWatcher`, `BlockWriter`, marks, manifest.
`python -m tests.support.simulation FIRST LAST STEP` runs the schedules of these seeds, and prints what failed as JSON.
"""

import atexit
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evl_cache.clips import Clip, ClipList
from evl_cache.errors import EvlCacheError
from evl_cache.extract.block import ExtractedBlock
from evl_cache.extract.block_taker import BlockTaker
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.redo import BlockRedo, KeptRows, failed_rows, rows_by_block
from evl_cache.extract.stage_seconds import StageSeconds
from evl_cache.spec import CHUNK_KEYS, CacheSpec, TowerSpec, ViewSpec
from evl_cache.store import (
    LOCKS_NAME,
    BlockLock,
    BlockNotDone,
    BlockWriter,
    ClipRecord,
    LockWatcher,
    array_layouts,
    create_cache,
    finish_cache,
    valid_mark,
    verify_cache,
)
from evl_cache.store.disk.checksum import file_digest
from evl_cache.store.disk.file_system import is_local
from evl_cache.store.disk.runtime import Runtime
from evl_cache.store.format.layout import MANIFEST_NAME
from evl_cache.store.format.manifest import Manifest, read_manifest
from evl_cache.store.shards.shard import ShardRecord
from evl_cache.towers import Tower
from tests.support.simulated_world import (
    EXPIRY_S,
    Failed,
    Inline,
    Plan,
    Process,
    SimulatedRuntime,
    World,
    patched,
)

MOST_CALLS = 70  # of a process that does one block, about: later it neither dies nor pauses
_SCRATCH = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


class SimulatedBlock:
    """A block that is being extracted."""

    def __init__(self, block: int, writer: BlockWriter, kept: KeptRows | None) -> None:
        self.block, self.writer, self.kept = block, writer, kept
        self.is_ready = False
        self.records: list[ClipRecord] = []
        self.are_kept: list[bool] = []


class SimulatedExtractor:
    """Takes time, and gives rows that tell their block and, where that differs, the processor."""

    def __init__(self, process: Process, spec: CacheSpec, runtime: Runtime) -> None:
        self.waited = StageSeconds()
        self._process, self._spec, self._runtime = process, spec, runtime
        self._begun: list[SimulatedBlock] = []

    @property
    def has_room(self) -> bool:
        return len(self._begun) < 2

    def begin(self, block: int, lock: BlockLock, redo: BlockRedo | None = None) -> SimulatedBlock:
        self._process.extracted.append(block)
        writer = BlockWriter(
            self._process.world.root,
            self._spec,
            block,
            lock=lock,
            encoders=Inline(),  # type: ignore[arg-type]
            runtime=self._runtime,
        )
        kept = None
        if redo is not None and (mark := valid_mark(self._process.world.root, self._spec, block)) is not None:
            kept = KeptRows(self._process.world.root, self._spec, mark, redo)
        self._begun.append(SimulatedBlock(block, writer, kept))
        return self._begun[-1]

    def wait(self, seconds: float) -> None:
        """Extract the first block that was begun, if there is time."""
        if seconds == 0:
            return
        begun = self._begun[0]
        kept = begun.kept
        for row in self._spec.clips_of_block(begun.block):
            self._runtime.sleep(self._process.world.rng.random() * 6.0)
            is_kept = kept is not None and kept.is_intact(row)
            if kept is not None and is_kept:
                begun.writer.append_stored(kept.stored(row)[0])
            elif _is_gone(row, self._spec):
                begun.writer.append(None)
            else:
                begun.writer.append(_row(row, self._process.plan.kind))
            error = "its video is gone" if _is_gone(row, self._spec) and not is_kept else None
            begun.records.append(ClipRecord(id=str(row), error=error))
            begun.are_kept.append(is_kept)
        begun.is_ready = True

    def end(self, begun: SimulatedBlock) -> ExtractedBlock:
        self._begun.remove(begun)
        environment = {"kind": self._process.plan.kind}
        if begun.kept is not None:
            clips = zip(begun.records, begun.are_kept, strict=True)
            made = [not is_kept for clip, is_kept in clips if not clip.error]
            environment = begun.kept.environment(environment, are_new=True in made, are_kept=False in made)
        return ExtractedBlock(
            writer=begun.writer,
            records=tuple(begun.records),
            kept=tuple(begun.are_kept),
            environment=environment,
        )

    def close(self) -> None:
        for begun in self._begun:
            begun.writer.close()


def _is_gone(row: int, spec: CacheSpec) -> bool:
    """Whether a clip cannot be made again: in caches to be redone, the first one of each block."""
    return spec.block_clips > 1 and row % spec.block_clips == 0


@lru_cache(maxsize=64)
def _job(root: Path, blocks: int, block_clips: int, chunk_keys: str) -> ExtractionJob:
    spec = simulated_spec(blocks, block_clips, chunk_keys)
    tower = Tower(visual=torch.nn.Identity(), spec=spec.tower)
    return ExtractionJob(
        clips=simulated_clips(spec.num_clips), root=root, cache_path=root, spec=spec, tower=tower
    )


@lru_cache(maxsize=64)
def _row(row: int, kind: int) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: np.full((1, *layout.chunk_shape), row + 1 + kind / 2, layout.dtype)
        for name, layout in array_layouts(simulated_spec(1)).items()
    }


def simulated_clips(count: int) -> ClipList:
    """The list of so many clips."""
    clips = [Clip(id=str(row), path=str(row), label=0, split="train") for row in range(count)]
    return ClipList(clips=tuple(clips), classes=("only",), source="simulated")


@lru_cache(maxsize=64)
def simulated_spec(blocks: int, block_clips: int = 1, chunk_keys: str = CHUNK_KEYS[0]) -> CacheSpec:
    """The smallest features there are: two arrays of one layer."""
    tower = TowerSpec(
        model="none", pretrained="none", weights_sha256="0" * 64, image_size=2, patch_size=2, width=2, blocks=1,
        heads=1, quick_gelu=True, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    return CacheSpec(
        dataset="simulated", split="train", classes=("only",), tower=tower, views=ViewSpec(frames=1), layers=(1,),
        tokens="fp16", maps="none", codec="raw", compute_dtype="float32", num_clips=blocks * block_clips,
        content_id=simulated_clips(blocks * block_clips).content_id,
        block_clips=block_clips, chunk_keys=chunk_keys,
    )  # fmt: skip


def _kind(spec: CacheSpec) -> tuple[int, int, str]:
    return spec.num_blocks, spec.block_clips, spec.chunk_keys


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a schedule: how often each block was extracted, the calls it took, and whether the command was run again."""

    extracted: Counter[int]
    steps: int
    has_run_again: bool


def run_schedule(plans: list[Plan], *, blocks: int, seed: int, redo: bool = False) -> Outcome:
    """Run processes to their end, and check that every block is done, none doubled, none lost.

    Args:
        redo: the blocks are done before, each with one good clip that cannot be made again and one that failed.

    Raises: Failed.
    """
    is_local.cache_clear()  # what it remembers of a schedule before would spare this one a step
    rng, keys = random.Random(seed), CHUNK_KEYS[seed % 5 == 4]  # some in a cache of the older kind
    spec = simulated_spec(blocks, 2 if redo else 1, keys)
    with _laid_down(spec) as root:
        if redo:
            _write_with_failures(root, spec)
        world = World(rng, root)
        with patched(world):
            try:
                for pid, plan in enumerate(plans, 1):
                    process = Process(world, plan, pid)
                    world.processes.append(process)
                    world.spawn(process, lambda process=process: _work(process, spec), plan.starts_s)
                world.run()
                has_run_again = _needs_another_run(world, spec)
                if has_run_again:
                    process = Process(world, Plan(host="again"), len(plans) + 1)
                    world.processes.append(process)
                    world.spawn(process, lambda process=process: _work(process, spec, repairs=True))
                    world.run()
                survivors = [process for process in world.processes if process.is_alive]
            finally:
                world.end()
        _check(root, spec, world.processes, survivors)
    return Outcome(
        extracted=Counter(block for process in world.processes for block in process.extracted),
        steps=world.steps,
        has_run_again=has_run_again,
    )


_DESCRIPTION = ("zarr.json", "clips.jsonl", "recovery.json")
_FOLDERS: dict[
    tuple[int, int, str], Path
] = {}  # making and removing directories would take a third of the time


@contextmanager
def _laid_down(spec: CacheSpec) -> Iterator[Path]:
    """A cache's directory without a block, a lock or a leftover."""
    key = _kind(spec)
    if key not in _FOLDERS:
        folder = Path(tempfile.mkdtemp(prefix="evl-simulation-", dir=_SCRATCH))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        create_cache(
            folder / "cache", spec, simulated_clips(spec.num_clips).clips, origin={}, created_with={}
        )
        for layout in array_layouts(spec).values():
            for block in range(spec.num_blocks):
                os.makedirs(layout.shard(folder / "cache", block).parent, exist_ok=True)
        _FOLDERS[key] = folder / "cache"
    try:
        yield _FOLDERS[key]
    finally:
        for directory, _, names in os.walk(_FOLDERS[key]):
            for name in names:
                if name not in _DESCRIPTION:
                    os.unlink(os.path.join(directory, name))


def _write_with_failures(root: Path, spec: CacheSpec) -> None:
    """Write every block with the clips that cannot be made again, as they were made; the others failed."""
    locks = LockWatcher(root / LOCKS_NAME)
    for block in range(spec.num_blocks):
        lock = locks.take(block)
        assert lock is not None
        writer = BlockWriter(root, spec, block, lock=lock, encoders=Inline())  # type: ignore[arg-type]
        records = []
        for row in spec.clips_of_block(block):
            writer.append(_row(row, 0) if _is_gone(row, spec) else None)
            records.append(ClipRecord(id=str(row), error=None if _is_gone(row, spec) else "broken"))
        writer.commit(records, {"kind": 0})
        writer.close()
        lock.release()
    finish_cache(root, spec)


def _work(process: Process, spec: CacheSpec, *, repairs: bool = False) -> None:
    world, runtime = process.world, SimulatedRuntime(process)

    def next_number() -> int | None:
        if not process.plan.numbers or world.rng.random() < 0.1:  # no store, or it does not answer now
            return None
        world.numbers += 1
        return world.numbers - 1

    try:
        job = _job(world.root, *_kind(spec))
        rows = rows_by_block(spec, failed_rows(job)) if spec.block_clips > 1 else {}
        redo = {block: BlockRedo(again=again) for block, again in rows.items()}
        if repairs:
            redo |= {block: BlockRedo(rewrite=True) for block in _broken(world.root, spec)}
        taker = BlockTaker(
            job,
            SimulatedExtractor(process, spec, runtime),
            redo=redo,
            options=ExtractOptions(lock_expiry_s=EXPIRY_S),
            next_number=next_number,
            runtime=runtime,
        )
        while process.result is None:  # as `extract` does
            taker.run(range(spec.num_blocks))
            with suppress(BlockNotDone):
                process.result = finish_cache(world.root, spec, lock_expiry_s=EXPIRY_S, runtime=runtime)
    except (EvlCacheError, OSError) as error:
        process.result = error
    process.ended_s = world.now_s


def _needs_another_run(world: World, spec: CacheSpec) -> bool:
    """Where one took a block back that it had no lock for any more, and died before it redid the block.

    That is seen: there is no mark or no manifest then, and the same command again does the rest. In a redo a block may be
    left with files that are not those of its mark; repair mends it.
    """
    if all(process.is_alive for process in world.processes):
        return False
    marked = all(valid_mark(world.root, spec, block) for block in range(spec.num_blocks))
    is_mixed = spec.block_clips > 1 and bool(_broken(world.root, spec))
    return is_mixed or not marked or not (world.root / MANIFEST_NAME).exists()


def _broken(root: Path, spec: CacheSpec) -> list[int]:
    """Blocks that `verify` blames."""
    return [problem.block for problem in verify_cache(root).problems if problem.block is not None]


def _check(root: Path, spec: CacheSpec, processes: list[Process], survivors: list[Process]) -> None:
    if not survivors:
        raise Failed("nobody is left to finish: the plans are wrong")
    for process in survivors:
        if not isinstance(process.result, str):
            raise Failed(f"process {process.pid} ended with {process.result!r}")
    manifest = read_manifest(root, spec)
    # A block that is redone after a process ended, because a paused one broke it, has the digest of who redoes it.
    told = {process.result for process in survivors if process.ended_s >= survivors[0].world.last_marked_s}
    # Nobody may have: one that had been paused wrote the very same mark again, and died.
    if not told <= {manifest.digest}:
        raise Failed("the manifest is not the one that the processes were told")
    for block in range(spec.num_blocks):
        mark = valid_mark(root, spec, block)
        if mark is None:
            raise Failed(f"block {block} has no valid mark")
        if any(clip.error for clip in mark.clips):
            raise Failed(f"block {block} has failed clips: {mark.clips}")
        for name, layout in array_layouts(spec).items():
            _check_file(layout.shard(root, block), mark.files[name], manifest, root)
            stored = layout.shard(root, block).read_bytes()
            for number, row in enumerate(spec.clips_of_block(block)):
                kind = 0 if _is_gone(row, spec) else int(mark.environment["kind"])
                values = _row(row, kind)[
                    name
                ].tobytes()  # the raw codec stores them as they are, and four bytes more
                if stored[number * (len(values) + 4) :][: len(values)] != values:
                    raise Failed(f"block {block}: {name} holds other values than its mark's processor makes")
    disturbances = sum(process.disturbances for process in processes)
    count = sum(len(process.extracted) for process in processes)
    # A process holds three: two it extracts, one it commits. What it changed of a redo after it had lost it is redone.
    most = spec.num_blocks + (3 if spec.block_clips == 1 else 6) * disturbances
    if count > most:
        raise Failed(f"{count} extractions of {spec.num_blocks} blocks, {disturbances} disturbances")


def _check_file(path: Path, record: ShardRecord, manifest: Manifest, root: Path) -> None:
    if not path.exists() or file_digest(path) != (record.size, record.sha256):
        raise Failed(f"{path.name} of a marked block is not what the mark names")
    if manifest.files[path.relative_to(root).as_posix()] != (record.size, record.sha256):
        raise Failed(f"{path} is not what the manifest names")


def random_plan(rng: random.Random, number: int) -> Plan:
    """A process that may start late, die, stand still, be slow, and share a host or a kind of processor."""
    pauses = {}
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 2)):
            pauses[rng.randint(1, MOST_CALLS)] = rng.choice((0.1, 2.0, 4.0)) * EXPIRY_S * rng.random()
    return Plan(
        starts_s=rng.random() * rng.choice((0.0, 0.01, 5.0, 60.0)),
        host=rng.choice(("a", "b", f"own {number}")),
        kind=rng.randint(0, 1),
        dies_at=rng.randint(1, MOST_CALLS) if number and rng.random() < 0.4 else None,  # the first one stays
        after=rng.random() < 0.5,
        loses_unsynced=rng.random() < 0.5,
        pauses=pauses,
        slowness=rng.choice((1.0, 1.0, 1.0, 1.0, 30.0, 300.0)),
        numbers=rng.random() < 0.5,
    )


def simulate(seed: int) -> Outcome:
    """The schedule of a seed: one in eight is calm, and then no block is worked on twice.

    Mostly small ones: two processes and one block have most of the ways to go wrong, and thousands fit in seconds.
    """
    rng = random.Random(seed)
    blocks, count = rng.choice((1, 1, 1, 1, 2, 3)), rng.choice((2, 2, 2, 2, 3, 4))
    if seed % 8:
        return run_schedule([random_plan(rng, number) for number in range(count)], blocks=blocks, seed=seed)
    plans = [
        Plan(starts_s=rng.choice((0.0, 2.0)), host=f"{number}", kind=number % 2, numbers=rng.random() < 0.5)
        for number in range(count)
    ]
    return run_schedule(plans, blocks=blocks, seed=seed)


def simulate_redo(seed: int) -> Outcome:
    """The schedule of a seed in which processes try again what failed in one or two blocks."""
    rng = random.Random(seed)
    count = rng.choice((2, 2, 2, 3))
    plans = [random_plan(rng, number) for number in range(count)]
    return run_schedule(plans, blocks=rng.choice((1, 1, 2)), seed=seed, redo=True)


def first_failure(seeds: range, simulate_one: Callable[[int], Outcome] = simulate) -> tuple[int, str] | None:
    """The first seed whose schedule breaks a rule, and how; None where none does."""
    for seed in seeds:
        try:
            simulate_one(seed)
        except Exception as failure:
            return seed, repr(failure)
    return None


def main() -> None:
    """Seeds FIRST to LAST, one of every STEP."""
    first, last, step = (int(word) for word in sys.argv[1:4])
    failed = first_failure(range(first, last, step)) or first_failure(
        range(first, last, 4 * step), simulate_redo
    )
    sys.stdout.write(json.dumps(failed))


if __name__ == "__main__":
    main()
