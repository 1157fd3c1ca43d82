"""Blocks of stage one on their way: decode, forward pass, quantise, hand to the writer."""

import gc
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from evl_cache.errors import is_want_of_memory, told_of_memory
from evl_cache.extract.clips_ahead import ClipsAhead
from evl_cache.extract.defaults import batch_for, workers_for
from evl_cache.extract.device_pipeline import ClipRows, DevicePipeline
from evl_cache.extract.environment import run_environment
from evl_cache.extract.failure_limit import FailureCount
from evl_cache.extract.handoff import Closed
from evl_cache.extract.job import ExtractionJob, ExtractOptions, OnBottleneck, OnClip
from evl_cache.extract.outages import OnOutage, Surroundings
from evl_cache.extract.prepare import PreparedClip, prepare_clips
from evl_cache.extract.redo import BlockRedo, KeptRows
from evl_cache.extract.reuse import ReusableRows
from evl_cache.extract.segments import rows_by_video
from evl_cache.extract.stage_seconds import StageSeconds
from evl_cache.store import BlockLock, BlockWriter, ClipRecord, finished_blocks, valid_mark
from evl_cache.towers import Backbone
from evl_cache.video.pool import DecodePool

_LEAST_WAITING = 4  # clips that may wait for the device; more where a batch holds more
_MOST_BEGUN = 2  # blocks at a time: others want some too


@dataclass(frozen=True, kw_only=True)
class ExtractedBlock:
    """A block whose writer has all rows of it, ready to commit.

    Attributes:
        records: of every clip, in order.
        kept: whether each clip is as it was before, in a block that is redone.
    """

    writer: BlockWriter
    records: tuple[ClipRecord, ...]
    kept: tuple[bool, ...]
    environment: dict[str, Any]

    @property
    def made(self) -> tuple[ClipRecord, ...]:
        """Records of the clips that were extracted now."""
        return tuple(clip for clip, is_kept in zip(self.records, self.kept, strict=True) if not is_kept)


class BegunBlock:
    """A block of which clips are on their way.

    Args:
        lock: held by this process.
        kept: what it keeps, where it is redone.
    """

    def __init__(self, block: int, lock: BlockLock, kept: KeptRows | None, *, num_clips: int) -> None:
        self.block, self.lock, self.kept = block, lock, kept
        self.clips: list[tuple[ClipRecord, bool]] = []  # records, and whether the clip is as it was
        self.told = 0  # clips that were reported
        self._num_clips = num_clips
        self.writer: BlockWriter | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the writer has all its rows."""
        return len(self.clips) == self._num_clips


class BlockExtractor:
    """Extracts blocks, a few at a time, in the order in which they are begun. `close` it.

    Threads of its own do the work. Callbacks are called by `wait`, in its caller's thread, but for `on_outage`.

    Args:
        job: its tower is moved to the device, and to the spec's compute dtype.
        options: how; the last batch of a block is padded to `batch` samples.
        on_clip: called with whether it failed, after each clip.
        on_bottleneck: called with the stage that takes most (see `StageSeconds`), after each clip.
        on_outage: called when an outage begins, when it is over, and where the device has too little memory for a batch.

    Attributes:
        kept_instead: why clips that have features could not be made again, by clip id.
    """

    def __init__(
        self,
        job: ExtractionJob,
        *,
        options: ExtractOptions,
        on_clip: OnClip = lambda failed: None,
        on_bottleneck: OnBottleneck = lambda name: None,
        on_outage: OnOutage = lambda message: None,
    ) -> None:
        self.waited = StageSeconds()
        self.kept_instead: dict[str, str] = {}
        self._job, self._options = job, options
        self._on_clip, self._on_bottleneck, self._on_outage = on_clip, on_bottleneck, on_outage
        self._begun: list[BegunBlock] = []
        self._changed = threading.Event()
        spec, workers = job.spec, workers_for(options, job.spec)
        dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        visual = job.tower.visual.to(device=options.device, dtype=dtype)
        self._backbone = Backbone(visual, spec.stored_layers, with_maps=spec.stores_maps)
        self._decode_pool = DecodePool(
            workers.decoding, options=options.decoding, timeout_s=options.clip_timeout_s
        )
        self._reusable = (
            None
            if options.reuse is None
            else ReusableRows(options.reuse, spec, doubt=self._decode_pool.doubt)
        )
        self._surroundings = Surroundings(job.root, patience_s=options.outage_patience_s, on_outage=on_outage)
        self._encoders = ThreadPoolExecutor(workers.compressing, thread_name_prefix="encode")
        # A thread for each process, and one that crops meanwhile.
        self._threads = workers.decoding + 1
        has_stored = bool(finished_blocks(job.cache_path))
        self._counts_start = not has_stored
        self._from_start = FailureCount(limit=options.most_failures, uncounted=job.known_missing)
        self._set_up(batch_for(options, spec), has_stored=has_stored)

    def _set_up(self, batch: int, *, has_stored: bool) -> None:
        """Start the threads that prepare clips and run batches."""
        spec = self._job.spec
        self._ahead = ClipsAhead(
            threads=self._threads,
            waiting=max(_LEAST_WAITING, batch // spec.views.per_clip),
            clip_bytes=4 * 3 * spec.tower.image_size**2 * spec.views.frames * spec.views.per_clip,  # float32
            on_drained=self._changed.set,
        )
        self._pipeline = DevicePipeline(
            self._backbone,
            spec,
            device=torch.device(self._options.device),
            batch=batch,
            waited=self.waited,
            has_stored=has_stored,
            on_failure=self._changed.set,
        )
        self._environment = run_environment(self._options, spec, batch=batch, visual=self._backbone.visual)

    @property
    def batch(self) -> int:
        """Samples of a pass: fewer than at first where the device's memory did not suffice."""
        return self._pipeline.batch

    @property
    def has_room(self) -> bool:
        """Whether another block should be begun, so that the device does not wait."""
        return self._ahead.is_drained and len(self._begun) < _MOST_BEGUN

    def begin(self, block: int, lock: BlockLock, redo: BlockRedo | None = None) -> BegunBlock | None:
        """Have a block extracted after those that were begun before; `end` them in this order.

        Args:
            redo: why the block is done again, if it is.

        Returns: None where the block stays as it is.
        Raises: CacheError where the disk refuses; Outage where the videos cannot be read.
        """
        cache_path, spec = self._job.cache_path, self._job.spec
        mark = None if redo is None else valid_mark(cache_path, spec, block)
        kept = None if mark is None or redo is None else KeptRows(cache_path, spec, mark, redo)
        if kept is not None and not kept.redo.rewrite and not self._tries(kept):
            return None
        begun = BegunBlock(block, lock, kept, num_clips=len(spec.clips_of_block(block)))
        self._begun.append(begun)
        self._start(begun)
        return begun

    def _start(self, begun: BegunBlock) -> None:
        """Send the clips of a block on their way."""
        spec = self._job.spec
        begun.writer = BlockWriter(
            self._job.cache_path, spec, begun.block, lock=begun.lock, encoders=self._encoders
        )
        rows = spec.clips_of_block(begun.block)
        prepared = self._ahead.add(
            self._groups(rows), lambda together: self._kept_or_prepared(together, begun.kept)
        )
        clips = (ClipRows(clip, spec.views.per_clip) for clip in prepared)
        with suppress(Closed):  # it has stopped: `wait` tells why, or starts the block anew
            self._pipeline.add(clips, lambda clip: self._finish(begun, clip))

    def wait(self, seconds: float) -> None:
        """Wait until something has changed, for at most so many seconds; report what clips are done.

        Raises: what stopped the work.
        """
        self._changed.wait(seconds)
        self._changed.clear()
        for begun in self._begun:
            self._tell(begun)
        if (failure := self._pipeline.failure) is not None:
            if not is_want_of_memory(failure) or self._pipeline.failed_at_clips or self.batch == 1:
                raise failure
            self._halve_batch(failure)

    def _tell(self, begun: BegunBlock) -> None:
        while begun.told < len(begun.clips):
            record, _ = begun.clips[begun.told]
            begun.told += 1
            self._on_bottleneck(self.waited.bottleneck)
            self._on_clip(record.error is not None)
            if self._counts_start and begun.kept is None:
                self._from_start = self._from_start.after([record])
                self._from_start.check_start()

    def end(self, begun: BegunBlock) -> ExtractedBlock:
        """Return a block that is ready. The caller commits its writer, and closes it."""
        self._tell(begun)
        self._begun.remove(begun)
        records, kept = zip(*begun.clips, strict=True)
        environment = self._environment
        if begun.kept is not None:
            have_features = {is_kept for clip, is_kept in begun.clips if clip.error is None}
            environment = begun.kept.environment(
                environment, are_new=False in have_features, are_kept=True in have_features
            )
            begun.kept = None  # closed before the commit puts other files in the place of these
        assert begun.writer is not None
        return ExtractedBlock(writer=begun.writer, records=records, kept=kept, environment=environment)

    def close(self) -> None:
        """Stop the threads and processes; what was begun and not ended is dropped."""
        self._ahead.close(wait=False)
        self._surroundings.close()
        self._decode_pool.close()  # threads that wait for a worker hear that it is gone
        self._pipeline.close()
        self._ahead.close(wait=True)
        self._drop_writers()
        self._begun.clear()
        self._encoders.shutdown(wait=True, cancel_futures=True)

    def _drop_writers(self) -> None:
        for begun in self._begun:
            if begun.writer is not None:
                begun.writer.close()
                begun.writer = None

    def _halve_batch(self, failure: BaseException) -> None:
        """Do the begun blocks anew in batches of half the size: a block has one size of batch, which its mark names."""
        batch = (self.batch + 1) // 2
        self._on_outage(
            f"{told_of_memory(failure)} for batches of {self.batch} samples; going on with batches of "
            f"{batch}, as --batch {batch} would"
        )
        self._ahead.close(wait=False)
        self._pipeline.close()
        self._drop_writers()
        failure.__traceback__ = None  # whose frames hold tensors
        del failure
        gc.collect()
        if self._options.device.startswith("cuda"):
            torch.cuda.empty_cache()
        self._set_up(batch, has_stored=self._pipeline.has_stored)
        for begun in self._begun:
            begun.clips.clear()
            self._start(begun)

    def _tries(self, kept: KeptRows) -> bool:
        """Whether one of the clips that are to be made again can be: else nothing need be read or written."""
        rows = kept.again
        groups = self._groups(rows)
        for start in range(0, len(groups), self._threads):
            some = groups[start : start + self._threads]
            in_order = sorted(row for group in some for row in group)
            prepared = dict(zip(in_order, self._ahead.add(some, self._prepare), strict=True))
            kept.tried(prepared)
            if any(clip.record.error is None for clip in prepared.values()):
                return True
        for row in rows:
            if kept.record(row).error is None and (tried := kept.take(row)) is not None:
                self.kept_instead[tried.record.id] = tried.record.error or ""
        return False

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        """Rows of clips, those together that are decoded together."""
        return rows_by_video(rows, self._job.clips.clips, most=self._ahead.most_together)

    def _kept_or_prepared(self, rows: Sequence[int], kept: KeptRows | None) -> list[PreparedClip]:
        found = {} if kept is None else {row: clip for row in rows if (clip := kept.take(row)) is not None}
        lacking = [row for row in rows if row not in found]
        made = dict(zip(lacking, self._prepare(lacking), strict=True)) if lacking else {}
        return [(found | made)[row] for row in rows]

    def _prepare(self, rows: Sequence[int]) -> list[PreparedClip]:
        clips = [self._job.clips.clips[row] for row in rows]
        path, reusable = self._job.root / clips[0].path, self._reusable
        return prepare_clips(
            clips,
            self._job.root,
            tower=self._job.spec.tower,
            views=self._job.spec.views,
            is_known=lambda clip, sha256: reusable is not None and reusable.fetch(clip, sha256, path),
            decode=self._decode_pool.frames,
            surroundings=self._surroundings,
            may_be_missing=clips[0].id in self._job.known_missing,
        )

    def _finish(self, begun: BegunBlock, clip: ClipRows) -> None:
        """Hand a clip's rows to its block's writer, and note its record, and whether it is as it was before."""
        row = self._job.spec.clips_of_block(begun.block)[len(begun.clips)]
        record, rows, is_kept, kept, writer = clip.record, clip.rows, clip.is_kept, begun.kept, begun.writer
        assert writer is not None
        if record.error is None and not is_kept and not rows:
            assert self._reusable is not None
            record, rows = self._reusable.take(record)
        if not is_kept:
            record = replace(record, frame_rule=self._job.new_frame_rule)
        if kept is not None and not is_kept and record.error is not None and kept.is_intact(row):
            self.kept_instead[record.id] = record.error
            record, is_kept = kept.record(row), True
        if kept is not None and is_kept and record.error is None:
            for stored in kept.stored(row):
                writer.append_stored(stored)
        else:
            for sample in range(self._job.spec.views.per_clip):
                writer.append(None if record.error is not None else rows[sample])
        begun.clips.append((record, is_kept))
        self._changed.set()
