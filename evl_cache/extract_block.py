"""One block of stage one: decode, forward pass, quantise, hand to the writer.

B samples, T frames, S the tower's image size, L layers.
"""

import importlib.metadata
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from evl_cache.backbone import Backbone, Features
from evl_cache.clips import Clip
from evl_cache.decode_pool import DEFAULT_TIMEOUT_S, DecodePool
from evl_cache.errors import ClipError
from evl_cache.frames import PreparedClip, prepare_clip
from evl_cache.reuse import ReusableRows
from evl_cache.spec import CacheSpec, TowerSpec
from evl_cache.store import BlockLock, BlockWriter, ClipRecord, Row, make_row
from evl_cache.video import DecodeOptions

_LOOKAHEAD_CLIPS = 4  # decoded ahead of the forward pass, beyond what the workers hold
_PACKAGES = ("evl-cache", "torch", "open_clip_torch", "numpy", "numcodecs")


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A frozen tower with its description."""

    visual: nn.Module
    spec: TowerSpec


@dataclass(frozen=True, kw_only=True)
class ExtractedBlock:
    """A block whose rows are all with its writer, ready to commit."""

    writer: BlockWriter
    records: tuple[ClipRecord, ...]
    environment: dict[str, Any]


class StageSeconds:
    """What the thread that drives the device spends its time on: waiting for frames, the device, handing rows over."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("decoding", "device", "writing"), 0.0)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - started

    @property
    def bottleneck(self) -> str:
        """The stage that took the most time."""
        return max(self.seconds, key=self.seconds.__getitem__)


class BlockExtractor:
    """Extracts blocks one at a time. A context manager: leaving it stops the threads and processes.

    Args:
        clips: the whole list. root: what relative paths are relative to. cache, spec: where to, and what.
        tower: moved to `device` and the spec's compute dtype.
        batch: samples of one forward pass; the last of a block is padded to it.
        workers: processes that decode, and as many threads that crop and that compress.
        reuse: a cache whose rows of equal features and sources are copied.
        decoding, clip_timeout_s: see `decode_pool`.
        on_bottleneck: called with `decoding`, `device` or `writing` after each clip.
        on_clip: called with whether it failed, after each clip.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        *,
        root: Path,
        cache: Path,
        spec: CacheSpec,
        tower: Tower,
        device: str,
        batch: int,
        workers: int,
        reuse: Path | None,
        on_clip: Callable[[bool], None],
        decoding: DecodeOptions | None = None,
        clip_timeout_s: float = DEFAULT_TIMEOUT_S,
        on_bottleneck: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.waited = StageSeconds()
        self._on_bottleneck = on_bottleneck
        self.clips, self.root, self.cache, self.spec, self.on_clip = clips, root, cache, spec, on_clip
        self._device, self._batch = torch.device(device), batch
        dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self._stores_maps = spec.stores_maps
        visual = tower.visual.to(device=self._device, dtype=dtype)
        self._backbone = Backbone(visual, spec.stored_layers, with_maps=self._stores_maps)
        self._reusable = None if reuse is None else ReusableRows(reuse, spec)
        # A thread for each process, and one that crops meanwhile.
        self._decode_pool = DecodePool(workers, options=decoding, timeout_s=clip_timeout_s)
        self._decoders = ThreadPoolExecutor(workers + 1, thread_name_prefix="decode")
        self._encoders = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._lookahead = workers + _LOOKAHEAD_CLIPS
        self._environment = run_environment(
            batch=batch, device=self._device, compute_dtype=spec.compute_dtype
        )

    def extract(self, block: int, lock: BlockLock) -> ExtractedBlock:
        """Every row of a block handed to a new writer, which the caller commits and closes.

        Raises: CacheError where the disk refuses.
        """
        writer = BlockWriter(self.cache, self.spec, block, lock=lock, encoders=self._encoders)
        try:
            records = tuple(self._write_rows(block, writer))
        except BaseException:
            writer.close()
            raise
        return ExtractedBlock(writer=writer, records=records, environment=self._environment)

    def _write_rows(self, block: int, writer: BlockWriter) -> Iterator[ClipRecord]:
        """Records of the block's clips, in order; their rows go to the writer on the way."""
        waiting: deque[_ClipRows] = deque()
        batch: list[tuple[_ClipRows, int]] = []  # the clip and which of its samples
        for prepared in self._prepared(block):
            clip = _ClipRows(prepared, self.spec.views.per_clip)
            waiting.append(clip)
            # A failed or reused clip keeps its slots in the batches, empty: others' features do not depend on it.
            for sample in range(self.spec.views.per_clip):
                batch.append((clip, sample))
                if len(batch) == self._batch:
                    with self.waited.of("device"):
                        self._run_batch(batch)
                    batch = []
            while waiting and waiting[0].is_ready:
                yield self._finish(waiting.popleft(), writer)
        if batch:
            with self.waited.of("device"):
                self._run_batch(batch)
        for clip in waiting:
            yield self._finish(clip, writer)

    def _prepared(self, block: int) -> Iterator[PreparedClip]:
        """The block's clips in order, decoded a few ahead."""
        rows = iter(self.spec.clips_of_block(block))
        ahead: deque[Future[PreparedClip]] = deque()
        while True:
            while len(ahead) < self._lookahead and (row := next(rows, None)) is not None:
                ahead.append(self._decoders.submit(self._prepare, self.clips[row]))
            if not ahead:
                return
            with self.waited.of("decoding"):
                prepared = ahead.popleft().result()
            yield prepared

    def _prepare(self, clip: Clip) -> PreparedClip:
        is_known = (lambda clip_id, sha256: False) if self._reusable is None else self._reusable.has
        return prepare_clip(
            clip,
            self.root,
            tower=self.spec.tower,
            views=self.spec.views,
            is_known=is_known,
            decode=self._decode_pool.frames,
        )

    def _run_batch(self, batch: Sequence[tuple["_ClipRows", int]]) -> None:
        """One forward pass of fixed shape; each sample's row goes back to its clip."""
        size = self.spec.tower.image_size
        frames = torch.zeros(self._batch, self.spec.views.frames, 3, size, size)  # (B,T,3,S,S)
        for slot, (clip, sample) in enumerate(batch):
            if clip.samples is not None:
                frames[slot] = clip.samples[sample]
        if any(clip.samples is not None for clip, _ in batch):
            features = self._backbone(frames.to(self._device))
            for slot, (clip, _) in enumerate(batch):
                if clip.samples is not None:
                    clip.add(features, slot, self.spec)
        for clip, _ in batch:
            clip.leave_slot()

    def _finish(self, clip: "_ClipRows", writer: BlockWriter) -> ClipRecord:
        record, rows = clip.record, clip.rows
        if record.error is None and not rows:
            assert self._reusable is not None and record.source_sha256 is not None
            record, rows = self._reusable.fetch(record)
        with self.waited.of("writing"):
            for sample in range(self.spec.views.per_clip):
                writer.append(None if record.error is not None else rows[sample])
        self._on_bottleneck(self.waited.bottleneck)
        self.on_clip(record.error is not None)
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._decode_pool.close()  # threads that wait for a worker hear that it is gone
        self._decoders.shutdown(wait=True)
        self._encoders.shutdown(wait=True, cancel_futures=True)


class _ClipRows:
    """A clip on its way: its samples until they have run, its rows until all of them are there."""

    def __init__(self, prepared: PreparedClip, slots: int) -> None:
        self.record, self.samples = prepared.record, prepared.samples
        self.slots_left = slots
        self.rows: list[Row] = []

    def leave_slot(self) -> None:
        """One more of the clip's samples has run; after the last, its frames are let go."""
        self.slots_left -= 1
        if self.slots_left == 0:
            self.samples = None

    @property
    def is_ready(self) -> bool:
        return self.slots_left == 0

    def add(self, features: Features, slot: int, spec: CacheSpec) -> None:
        """Quantise the sample in `slot` of a batch; features that cannot be stored fail the clip."""
        if self.record.error is not None:
            return
        tokens = [features.tokens[layer][slot] for layer in spec.stored_layers]
        maps = [features.maps[layer][slot] for layer in spec.layers] if features.maps else None
        try:
            self.rows.append(make_row(tokens, maps, spec))
        except ClipError as error:
            self.record = replace(self.record, error=str(error))


def run_environment(*, batch: int, device: torch.device, compute_dtype: str) -> dict[str, Any]:
    """What decides the bytes of a block beside the cache's spec; kept in its mark."""
    return {
        "batch": batch,
        "device": device_name(device),
        "compute_dtype": compute_dtype,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Versions of what decides the bytes of a cache."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def device_name(device: torch.device) -> str:
    """What the GPU calls itself; of a CPU its instruction set, which decides the order of its sums."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
