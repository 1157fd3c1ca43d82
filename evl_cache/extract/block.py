"""One block of stage one: decode, forward pass, quantise, hand to the writer."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evl_cache.clips import Clip
from evl_cache.extract.clips_ahead import ClipsAhead
from evl_cache.extract.device_pipeline import ClipRows, DevicePipeline
from evl_cache.extract.environment import run_environment
from evl_cache.extract.job import ExtractionJob, ExtractOptions, OnBottleneck, OnClip
from evl_cache.extract.outages import OnOutage, Surroundings
from evl_cache.extract.prepare import PreparedClip, prepare_clip
from evl_cache.extract.reuse import ReusableRows
from evl_cache.extract.stage_seconds import StageSeconds
from evl_cache.store import BlockLock, BlockWriter, ClipRecord, marked_blocks
from evl_cache.towers import Backbone
from evl_cache.video.pool import DecodePool

_LEAST_WAITING = 4  # clips that may wait for the device; more where a batch holds more


@dataclass(frozen=True, kw_only=True)
class ExtractedBlock:
    """A block whose writer has all rows of it, ready to commit."""

    writer: BlockWriter
    records: tuple[ClipRecord, ...]
    environment: dict[str, Any]


class BlockExtractor:
    """Extracts blocks one at a time. `close` it.

    Args:
        job: its tower is moved to the device, and to the spec's compute dtype.
        options: how; the last batch of a block is padded to `batch` samples.
        on_clip: called with whether it failed, after each clip.
        on_bottleneck: called with the stage that takes most (see `StageSeconds`), after each clip.
        on_outage: called when an outage begins, and when it is over.
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
        self._job, self._on_clip, self._on_bottleneck = job, on_clip, on_bottleneck
        self._my_locks: deque[Path] = deque(maxlen=2)  # of this block, and of the one being committed
        spec, workers, device = job.spec, options.decode_workers, torch.device(options.device)
        visual = job.tower.visual.to(device=device, dtype=getattr(torch, spec.compute_dtype))
        backbone = Backbone(visual, spec.stored_layers, with_maps=spec.stores_maps)
        self._pipeline = DevicePipeline(
            backbone, spec, device=device, batch=options.batch, waited=self.waited
        )
        self._reusable = None if options.reuse is None else ReusableRows(options.reuse, spec)
        self._decode_pool = DecodePool(workers, options=options.decoding, timeout_s=options.clip_timeout_s)
        self._surroundings = Surroundings(job.root, patience_s=options.outage_patience_s, on_outage=on_outage)
        # A thread for each process, and one that crops meanwhile.
        self._ahead = ClipsAhead(
            lambda row: self._prepare(job.clips.clips[row]),
            threads=workers + 1,
            waiting=max(_LEAST_WAITING, options.batch // spec.views.per_clip),
            clip_bytes=4 * 3 * spec.tower.image_size**2 * spec.views.frames * spec.views.per_clip,  # float32
        )
        self._encoders = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._environment = run_environment(options, spec)

    def extract(self, block: int, lock: BlockLock) -> ExtractedBlock:
        """Hand every row of a block to a new writer, which the caller commits and closes.

        Raises: CacheError where the disk refuses; Outage where the videos cannot be read.
        """
        self._my_locks.append(lock.path)
        writer = BlockWriter(self._job.cache_path, self._job.spec, block, lock=lock, encoders=self._encoders)
        try:
            clips = self._pipeline.run(self._clips_of(block))
            records = tuple(self._finish(clip, writer) for clip in clips)
        except BaseException:
            writer.close()
            raise
        return ExtractedBlock(writer=writer, records=records, environment=self._environment)

    def _clips_of(self, block: int) -> Iterator[ClipRows]:
        rows = self._job.spec.clips_of_block(block)
        for prepared in self._ahead.of(rows, likely_next=lambda: self._likely_next(block)):
            yield ClipRows(prepared, self._job.spec.views.per_clip)

    def _likely_next(self, block: int) -> Sequence[int]:
        """Clips of the next block that is not done; none where other jobs are at work, which may take it."""
        locks = set(self._my_locks[-1].parent.glob(f"*{self._my_locks[-1].suffix}"))
        if {path for path in locks if path.stem.isdecimal()} - set(self._my_locks):
            return ()
        done = marked_blocks(self._job.cache_path)
        following = (other for other in range(block + 1, self._job.spec.num_blocks) if other not in done)
        found = next(following, None)
        return () if found is None else self._job.spec.clips_of_block(found)

    def _prepare(self, clip: Clip) -> PreparedClip:
        is_known = (lambda clip_id, sha256: False) if self._reusable is None else self._reusable.has
        return prepare_clip(
            clip,
            self._job.root,
            tower=self._job.spec.tower,
            views=self._job.spec.views,
            is_known=is_known,
            decode=self._decode_pool.frames,
            surroundings=self._surroundings,
            may_be_missing=clip.id in self._job.known_missing,
        )

    def _finish(self, clip: ClipRows, writer: BlockWriter) -> ClipRecord:
        record, rows = clip.record, clip.rows
        if record.error is None and not rows:
            assert self._reusable is not None and record.source_sha256 is not None
            record, rows = self._reusable.fetch(record)
        with self.waited.of("writing"):
            for sample in range(self._job.spec.views.per_clip):
                writer.append(None if record.error is not None else rows[sample])
        self._on_bottleneck(self.waited.bottleneck)
        self._on_clip(record.error is not None)
        return record

    def close(self) -> None:
        """Stop the threads and processes."""
        self._ahead.close(wait=False)
        self._surroundings.close()
        self._decode_pool.close()  # threads that wait for a worker hear that it is gone
        self._pipeline.close()
        self._ahead.close(wait=True)
        self._encoders.shutdown(wait=True, cancel_futures=True)
