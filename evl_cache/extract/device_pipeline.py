"""Batches are gathered, brought to the device, run and quantised by threads of their own, across blocks.

B samples of a batch, T frames, S the tower's image size.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from evl_cache.errors import ClipError, UsageError
from evl_cache.extract.handoff import Closed, Handoff
from evl_cache.extract.prepare import PreparedClip
from evl_cache.extract.stage_seconds import StageSeconds
from evl_cache.spec import CacheSpec
from evl_cache.store import FeaturesOverflow, Row, make_rows
from evl_cache.towers import Backbone, Features

_BATCHES_AT_ONCE = 2  # whose features are on the device: one that runs, one whose rows are made
_UNSTORABLE_FROM_THE_START = 8  # clips, of which no sample can be stored: the tower's fault, not theirs


class ClipRows:
    """A clip in the pipeline: its samples until they have run, then its rows as they are made."""

    def __init__(self, prepared: PreparedClip, samples: int) -> None:
        self.record, self.samples, self.is_kept = prepared.record, prepared.samples, prepared.is_kept
        self.samples_left = samples
        self.rows: list[Row] = []

    def add(self, row: Row | ClipError | None) -> bool:
        """Take what was made of the next sample; features that cannot be stored fail the clip.

        Args:
            row: None where there was nothing to run.

        Returns: whether that was its last sample.
        """
        if isinstance(row, ClipError):
            if self.record.error is None:
                self.record = replace(self.record, error=str(row))
        elif row is not None:
            self.rows.append(row)
        self.samples_left -= 1
        return self.samples_left == 0


Slot = tuple[ClipRows, int]  # a clip, and which of its samples
OnReady = Callable[[ClipRows], None]


@dataclass(frozen=True, kw_only=True)
class _Staged:
    """A batch on the device.

    Attributes:
        slots: where its samples come from.
        is_filled: whether each slot has a sample.
        on_ready: takes each clip of which it has the last sample.
        frames: float32 (B, T, 3, S, S); None where no slot has a sample.
        waited_s: time that gathering its clips took.
        transfer_s: time that bringing them to the device took.
        idle_s: time that was spent without a block: others have those that are left, or the one before is committed.
    """

    slots: Sequence[Slot]
    is_filled: Sequence[bool]
    on_ready: OnReady
    frames: torch.Tensor | None
    waited_s: float
    transfer_s: float
    idle_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Ran:
    """A batch that the device runs, or has run; `staged` is kept as another stream owns its memory."""

    staged: _Staged
    features: Features | None
    event: torch.cuda.Event | None


class DevicePipeline:
    """Runs batches of one fixed shape, block after block. `close` it.

    While a batch runs, one thread gathers the next and brings it to the device. On a GPU another thread makes the
    rows of the batch before and hands them on, so that the device always has work; on a CPU the two would compete for
    cores. A batch never crosses the blocks: what a block's features are follows from the block alone. The device does not
    wait between them.

    Args:
        backbone: on `device`.
        batch: samples of a pass.
        waited: the seconds that the device's thread waits are added to it.
        has_stored: whether features of the tower were stored before.
        on_failure: called, from any thread, when the pipeline has stopped because of `failure`.

    Attributes:
        failure: what ended it.
        failed_at_clips: whether that came with the clips, and neither from the device nor from what becomes of rows.
        has_stored: whether features of the tower were stored.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: CacheSpec,
        *,
        device: torch.device,
        batch: int,
        waited: StageSeconds,
        has_stored: bool = False,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        if str(device) == "cuda":  # without a number it is another one in other threads
            device = torch.device("cuda", torch.cuda.current_device())
        self._backbone, self._spec, self._device, self.batch = backbone, spec, device, batch
        self._waited, self._on_failure = waited, on_failure
        self.failure: BaseException | None = None
        self.failed_at_clips, self.has_stored = False, has_stored
        self._unstorable: set[ClipRows] = set()  # until something is stored
        self._is_gpu = self.makes_rows_beside = device.type == "cuda"
        # Copies to the device and rows wait neither for the batch that runs nor for each other.
        self._copies = torch.cuda.Stream(device) if self._is_gpu else None  # type: ignore[no-untyped-call]
        self._rows = torch.cuda.Stream(device) if self._is_gpu else None  # type: ignore[no-untyped-call]
        self._blocks: Handoff[tuple[Iterable[ClipRows], OnReady]] = Handoff()
        self._staged: Handoff[_Staged] = Handoff(1)
        self._ran: Handoff[_Ran] = Handoff()
        # A place is taken by each batch whose features are on the device, and given back when its rows are made.
        self._places: Handoff[None] = Handoff(_BATCHES_AT_ONCE)
        self._taken_places = iter(self._places)
        self._writing_share = 0.0  # of the time in which the rows of the last batch were made and handed on
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("gather", self._gather), ("device", self._run), ("rows", self._make_rows))
        ]
        for thread in self._threads:
            thread.start()

    def add(self, clips: Iterable[ClipRows], on_ready: OnReady) -> None:
        """Have the clips of a block run after all that were added before.

        Args:
            clips: in order; waited for in a thread.
            on_ready: called from a thread with each, in order, when all its rows are made. What it raises ends the pipeline.
        """
        self._blocks.put((clips, on_ready))

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            if self._is_gpu:
                torch.cuda.set_device(self._device)
            work()
        except Closed:
            return
        except BaseException as error:  # kept for the thread that owns the pipeline
            self.failure = self.failure or error
            self._end()
            self._on_failure()

    def _gather(self) -> None:
        """Bring the batches of one block after another to the device."""
        started = time.monotonic()
        for clips, on_ready in self._blocks:
            idle_s = time.monotonic() - started
            for staged in self._batches(self._watched(clips), on_ready):
                self._staged.put(replace(staged, idle_s=idle_s))
                del staged
                idle_s = 0.0
            started = time.monotonic()

    def _watched(self, clips: Iterable[ClipRows]) -> Iterator[ClipRows]:
        try:
            yield from clips
        except Exception:  # not where a failure elsewhere closes this generator
            self.failed_at_clips = self.failure is None
            raise

    def _batches(self, clips: Iterable[ClipRows], on_ready: OnReady) -> Iterator[_Staged]:
        slots: list[Slot] = []
        started = time.monotonic()
        for clip in clips:
            # A failed or reused clip keeps its slots in the batches, empty: others' features do not depend on it.
            for sample in range(self._spec.views.per_clip):
                slots.append((clip, sample))
                if len(slots) == self.batch:
                    yield self._stage(slots, on_ready, waited_s=time.monotonic() - started)
                    slots, started = [], time.monotonic()
        if slots:
            yield self._stage(slots, on_ready, waited_s=time.monotonic() - started)

    def _stage(self, slots: Sequence[Slot], on_ready: OnReady, *, waited_s: float) -> _Staged:
        started = time.monotonic()
        is_filled = [clip.samples is not None for clip, _ in slots]
        frames: torch.Tensor | None = None
        if any(is_filled):
            size = self._spec.tower.image_size
            shape = (self.batch, self._spec.views.frames, 3, size, size)
            frames = torch.empty(shape, pin_memory=self._is_gpu)
            for slot, (clip, sample) in enumerate(slots):
                if clip.samples is None:
                    frames[slot] = 0
                else:
                    frames[slot] = clip.samples[sample]
            frames[len(slots) :] = 0
            frames = self._transferred(frames)
        for clip, sample in slots:
            if sample == self._spec.views.per_clip - 1:
                clip.samples = None  # all of them are in batches now
        return _Staged(
            slots=slots,
            is_filled=is_filled,
            on_ready=on_ready,
            frames=frames,
            waited_s=waited_s,
            transfer_s=time.monotonic() - started,
        )

    def _transferred(self, frames: torch.Tensor) -> torch.Tensor:
        if self._copies is None:
            return frames.to(self._device)
        with torch.cuda.stream(self._copies):
            there = frames.to(self._device, non_blocking=True)
        self._copies.synchronize()
        return there

    def _run(self) -> None:
        """Run batch after batch, and have its rows made."""
        started = time.monotonic()
        for staged in self._staged:
            self._note_wait(staged, time.monotonic() - started)
            started = time.monotonic()
            self._places.put(None)
            waited_s = time.monotonic() - started
            self._waited.add("writing", self._writing_share * waited_s)
            self._waited.add("device", (1 - self._writing_share) * waited_s)
            ran = self._start(staged)
            if self.makes_rows_beside:
                self._ran.put(ran)
            else:
                self._make_rows_of(ran)
            del staged, ran
            started = time.monotonic()

    def _note_wait(self, staged: _Staged, waited_s: float) -> None:
        """Share out the time that the device's thread waited for a batch by what gathering and transferring took of it."""
        waited_s = max(0.0, waited_s - staged.idle_s)
        decoding = staged.waited_s / max(staged.waited_s + staged.transfer_s, 1e-9)
        self._waited.add("decoding", decoding * waited_s)
        self._waited.add("transfer", (1 - decoding) * waited_s)

    def _start(self, staged: _Staged) -> _Ran:
        with self._waited.of("device"):
            features = None if staged.frames is None else self._backbone(staged.frames)
            event = torch.cuda.current_stream(self._device).record_event() if self._is_gpu else None
        return _Ran(staged=staged, features=features, event=event)

    def _make_rows(self) -> None:
        for ran in self._ran:
            self._make_rows_of(ran)
            del ran  # another stream owns its memory

    def _make_rows_of(self, ran: _Ran) -> None:
        """Give each sample's row to its clip, and hand on the clips that have all of theirs."""
        started = time.monotonic()
        staged = ran.staged
        rows: Sequence[Row | ClipError | None] = [None] * len(staged.slots)
        if ran.features is not None:
            made = self._rows_of(ran.features, ran.event)
            rows = [
                row if is_filled else None for row, is_filled in zip(made, staged.is_filled, strict=False)
            ]
            self._check_storable(
                [(clip, row) for (clip, _), row in zip(staged.slots, rows, strict=True) if row is not None]
            )
        made_s = time.monotonic() - started
        for (clip, _), row in zip(staged.slots, rows, strict=True):
            if clip.add(row):
                staged.on_ready(clip)
        writing_s = time.monotonic() - started - made_s
        self._writing_share = writing_s / max(made_s + writing_s, 1e-9)
        if not self.makes_rows_beside:
            self._waited.add("device", made_s)
            self._waited.add("writing", writing_s)
        next(self._taken_places)

    def _rows_of(self, features: Features, event: torch.cuda.Event | None) -> Sequence[Row | ClipError]:
        spec = self._spec
        tokens = [features.tokens[layer] for layer in spec.stored_layers]
        maps = [features.maps[layer] for layer in spec.layers] if features.maps else None
        with torch.cuda.stream(self._rows):  # None changes no stream
            if self._rows is not None and event is not None:
                self._rows.wait_event(event)
            return make_rows(tokens, maps, spec)

    def _check_storable(self, rows: Sequence[tuple[ClipRows, Row | ClipError]]) -> None:
        """Check that a tower of which nothing was stored yet is not at fault: then no clip is to blame.

        Args:
            rows: each with its clip, which may have several of them.

        Raises: UsageError where it overflows float16 on all clips of a batch, or none of the first clips can be stored.
        """
        failed = [(clip, row) for clip, row in rows if isinstance(row, ClipError)]
        self.has_stored |= len(failed) < len(rows)
        if self.has_stored:
            self._unstorable.clear()
        if self.has_stored or not failed:
            return
        clips = {clip for clip, _ in failed}
        self._unstorable |= clips
        _, first = failed[0]
        if len(clips) > 1 and all(isinstance(row, FeaturesOverflow) for _, row in failed):
            raise UsageError(f"every clip of a batch overflows in the tower: {first}")
        if len(self._unstorable) >= _UNSTORABLE_FROM_THE_START:
            raise UsageError(
                f"none of the first {len(self._unstorable)} clips can be stored, so no clip is to blame: {first}"
            )

    def _end(self) -> None:
        for handoff in (self._blocks, self._staged, self._ran, self._places):
            handoff.close()

    def close(self) -> None:
        """End its threads, and wait for them; what they have not handed on is dropped."""
        self._end()
        for thread in self._threads:
            thread.join()
