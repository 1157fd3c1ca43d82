"""One block of stage one: decode, forward pass, quantise, hand to the writer."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evl_cache.extract.clips_ahead import ClipsAhead
from evl_cache.extract.defaults import batch_for, workers_for
from evl_cache.extract.device_pipeline import ClipRows, DevicePipeline
from evl_cache.extract.environment import run_environment
from evl_cache.extract.job import ExtractionJob, ExtractOptions, OnBottleneck, OnClip
from evl_cache.extract.outages import OnOutage, Surroundings
from evl_cache.extract.prepare import PreparedClip, prepare_clip
from evl_cache.extract.redo import BlockRedo, KeptRows
from evl_cache.extract.reuse import ReusableRows
from evl_cache.extract.stage_seconds import StageSeconds
from evl_cache.store import BlockLock, BlockWriter, ClipRecord, finished_blocks, valid_mark
from evl_cache.towers import Backbone
from evl_cache.video.pool import DecodePool

_LEAST_WAITING = 4  # clips that may wait for the device; more where a batch holds more


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


class BlockExtractor:
    """Extracts blocks one at a time. `close` it.

    Args:
        job: its tower is moved to the device, and to the spec's compute dtype.
        options: how; the last batch of a block is padded to `batch` samples.
        on_clip: called with whether it failed, after each clip.
        on_bottleneck: called with the stage that takes most (see `StageSeconds`), after each clip.
        on_outage: called when an outage begins, and when it is over.

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
        self._kept: KeptRows | None = None
        self._job, self._on_clip, self._on_bottleneck = job, on_clip, on_bottleneck
        self._my_locks: deque[Path] = deque(maxlen=2)  # of this block, and of the one being committed
        spec, device = job.spec, torch.device(options.device)
        workers, batch = workers_for(options, spec), batch_for(options, spec)
        visual = job.tower.visual.to(device=device, dtype=getattr(torch, spec.compute_dtype))
        backbone = Backbone(visual, spec.stored_layers, with_maps=spec.stores_maps)
        self._pipeline = DevicePipeline(backbone, spec, device=device, batch=batch, waited=self.waited)
        self._decode_pool = DecodePool(
            workers.decoding, options=options.decoding, timeout_s=options.clip_timeout_s
        )
        self._reusable = (
            None
            if options.reuse is None
            else ReusableRows(options.reuse, spec, doubt=self._decode_pool.doubt)
        )
        self._surroundings = Surroundings(job.root, patience_s=options.outage_patience_s, on_outage=on_outage)
        # A thread for each process, and one that crops meanwhile.
        self._threads = workers.decoding + 1
        self._ahead = ClipsAhead(
            self._prepare,
            threads=self._threads,
            waiting=max(_LEAST_WAITING, batch // spec.views.per_clip),
            clip_bytes=4 * 3 * spec.tower.image_size**2 * spec.views.frames * spec.views.per_clip,  # float32
        )
        self._encoders = ThreadPoolExecutor(workers.compressing, thread_name_prefix="encode")
        self._environment = run_environment(options, spec, batch=batch, visual=visual)

    def extract(self, block: int, lock: BlockLock, redo: BlockRedo | None = None) -> ExtractedBlock | None:
        """Hand every row of a block to a new writer, which the caller commits and closes.

        Args:
            redo: why the block is done again, if it is.

        Returns: None where the block stays as it is.
        Raises: CacheError where the disk refuses; Outage where the videos cannot be read.
        """
        self._my_locks.append(lock.path)
        cache_path, spec = self._job.cache_path, self._job.spec
        mark = None if redo is None else valid_mark(cache_path, spec, block)
        self._kept = None if mark is None or redo is None else KeptRows(cache_path, spec, mark, redo)
        if self._kept is not None and not self._kept.redo.rewrite and not self._tries(self._kept):
            self._kept = None
            return None
        writer = BlockWriter(cache_path, spec, block, lock=lock, encoders=self._encoders)
        try:
            clips = self._pipeline.run(self._clips_of(block))
            rows = spec.clips_of_block(block)
            records, kept = zip(
                *(self._finish(row, clip, writer) for row, clip in zip(rows, clips, strict=True)), strict=True
            )
        except BaseException:
            writer.close()
            raise
        environment = self._environment_of(records, kept)
        self._kept = None  # closed before the commit puts other files in the place of these
        return ExtractedBlock(writer=writer, records=records, kept=kept, environment=environment)

    def _tries(self, kept: KeptRows) -> bool:
        """Whether one of the clips that are to be made again can be: else nothing need be read or written."""
        rows = kept.again
        for start in range(0, len(rows), self._threads):
            group = rows[start : start + self._threads]
            prepared = dict(zip(group, self._ahead.of(group, likely_next=lambda: ()), strict=True))
            kept.tried(prepared)
            if any(clip.record.error is None for clip in prepared.values()):
                return True
        for row in rows:
            if kept.record(row).error is None and (tried := kept.take(row)) is not None:
                self.kept_instead[tried.record.id] = tried.record.error or ""
        return False

    def _environment_of(self, records: Sequence[ClipRecord], kept: Sequence[bool]) -> dict[str, Any]:
        if self._kept is None:
            return self._environment
        have_features = {is_kept for clip, is_kept in zip(records, kept, strict=True) if clip.error is None}
        return self._kept.environment(
            self._environment, are_new=False in have_features, are_kept=True in have_features
        )

    def _clips_of(self, block: int) -> Iterator[ClipRows]:
        rows = self._job.spec.clips_of_block(block)
        for prepared in self._ahead.of(rows, likely_next=lambda: self._likely_next(block)):
            yield ClipRows(prepared, self._job.spec.views.per_clip)

    def _likely_next(self, block: int) -> Sequence[int]:
        """Clips of the next block that is not done; none where other jobs are at work, which may take it."""
        try:
            locks = set(self._my_locks[-1].parent.glob(f"*{self._my_locks[-1].suffix}"))
        except OSError:
            return ()  # a disk that refuses to list them: what matters is read elsewhere, and says so
        if {path for path in locks if path.stem.isdecimal()} - set(self._my_locks):
            return ()
        done = finished_blocks(self._job.cache_path)
        following = (other for other in range(block + 1, self._job.spec.num_blocks) if other not in done)
        found = next(following, None)
        return () if found is None else self._job.spec.clips_of_block(found)

    def _prepare(self, row: int) -> PreparedClip:
        kept = self._kept
        if kept is not None and row in kept.rows and (found := kept.take(row)) is not None:
            return found
        clip = self._job.clips.clips[row]
        path, reusable = self._job.root / clip.path, self._reusable
        return prepare_clip(
            clip,
            self._job.root,
            tower=self._job.spec.tower,
            views=self._job.spec.views,
            is_known=lambda clip_id, sha256: reusable is not None and reusable.fetch(clip_id, sha256, path),
            decode=self._decode_pool.frames,
            surroundings=self._surroundings,
            may_be_missing=clip.id in self._job.known_missing,
        )

    def _finish(self, row: int, clip: ClipRows, writer: BlockWriter) -> tuple[ClipRecord, bool]:
        """Hand a clip's rows to the writer. Return its record, and whether it is as it was before."""
        record, rows, is_kept = clip.record, clip.rows, clip.is_kept
        if record.error is None and not is_kept and not rows:
            assert self._reusable is not None
            record, rows = self._reusable.take(record)
        if not is_kept:
            record = replace(record, frame_rule=self._job.new_frame_rule)
        kept = self._kept
        if kept is not None and not is_kept and record.error is not None and kept.is_intact(row):
            self.kept_instead[record.id] = record.error
            record, is_kept = kept.record(row), True
        with self.waited.of("writing"):
            if kept is not None and is_kept and record.error is None:
                for stored in kept.stored(row):
                    writer.append_stored(stored)
            else:
                for sample in range(self._job.spec.views.per_clip):
                    writer.append(None if record.error is not None else rows[sample])
        self._on_bottleneck(self.waited.bottleneck)
        self._on_clip(record.error is not None)
        return record, is_kept

    def close(self) -> None:
        """Stop the threads and processes."""
        self._ahead.close(wait=False)
        self._surroundings.close()
        self._decode_pool.close()  # threads that wait for a worker hear that it is gone
        self._pipeline.close()
        self._ahead.close(wait=True)
        self._encoders.shutdown(wait=True, cancel_futures=True)
