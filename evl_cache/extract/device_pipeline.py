"""Batches are gathered, brought to the device, run and quantised, at the same time where that helps.

B samples of a batch, T frames, S the tower's image size.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from evl_cache.errors import ClipError
from evl_cache.extract.prepare import PreparedClip
from evl_cache.extract.stage_seconds import StageSeconds
from evl_cache.spec import CacheSpec
from evl_cache.store import Row, make_row
from evl_cache.towers import Backbone, Features


class ClipRows:
    """A clip in the pipeline: its samples until they have run, then its rows as they are made."""

    def __init__(self, prepared: PreparedClip, slots: int) -> None:
        self.record, self.samples, self.is_kept = prepared.record, prepared.samples, prepared.is_kept
        self.slots_left = slots
        self.rows: list[Row] = []

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


Slot = tuple[ClipRows, int]  # a clip, and which of its samples


@dataclass(frozen=True, kw_only=True)
class _Staged:
    """A batch on the device.

    Attributes:
        slots: where its samples come from.
        is_filled: whether each slot has a sample.
        frames: float32 (B, T, 3, S, S); None where no slot has a sample.
        waited_s: time that gathering its clips took.
        transfer_s: time that bringing them to the device took.
    """

    slots: Sequence[Slot]
    is_filled: Sequence[bool]
    frames: torch.Tensor | None
    waited_s: float
    transfer_s: float


class DevicePipeline:
    """Runs batches of one fixed shape. `close` it.

    While a batch runs, one thread gathers the next and brings it to the device. On a GPU another thread makes the
    rows of the batch before, so that the device always has work; on a CPU the two would compete for cores.

    Args:
        backbone: on `device`.
        batch: samples of a pass.
        waited: the seconds that the caller waits are added to it.
    """

    def __init__(
        self, backbone: Backbone, spec: CacheSpec, *, device: torch.device, batch: int, waited: StageSeconds
    ) -> None:
        self._backbone, self._spec, self._device, self._batch = backbone, spec, device, batch
        self._waited = waited
        self._gatherer = ThreadPoolExecutor(1, thread_name_prefix="gather")
        self._row_maker = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._is_gpu = self.makes_rows_beside = device.type == "cuda"
        # Copies to the device and rows wait neither for the batch that runs nor for each other.
        self._copies = torch.cuda.Stream(device) if self._is_gpu else None  # type: ignore[no-untyped-call]
        self._rows = torch.cuda.Stream(device) if self._is_gpu else None  # type: ignore[no-untyped-call]

    def run(self, clips: Iterable[ClipRows]) -> Iterator[ClipRows]:
        """Yield the clips in order, each when all its rows are made."""
        waiting: deque[ClipRows] = deque()
        running: deque[Future[None]] = deque()
        for staged in self._one_ahead(self._batches(clips, waiting)):
            with self._waited.of("device"):
                running.append(self._start(staged))
                if len(running) > 1 or not self.makes_rows_beside:
                    running.popleft().result()
            yield from _ready(waiting)
        while running:
            with self._waited.of("device"):
                running.popleft().result()
        yield from _ready(waiting)

    def _batches(self, clips: Iterable[ClipRows], waiting: deque[ClipRows]) -> Iterator[_Staged]:
        """Yield batches on the device, in the gathering thread, and add their clips to `waiting`."""
        slots: list[Slot] = []
        started = time.monotonic()
        for clip in clips:
            waiting.append(clip)
            # A failed or reused clip keeps its slots in the batches, empty: others' features do not depend on it.
            for sample in range(self._spec.views.per_clip):
                slots.append((clip, sample))
                if len(slots) == self._batch:
                    yield self._stage(slots, waited_s=time.monotonic() - started)
                    slots, started = [], time.monotonic()
        if slots:
            yield self._stage(slots, waited_s=time.monotonic() - started)

    def _stage(self, slots: Sequence[Slot], *, waited_s: float) -> _Staged:
        started = time.monotonic()
        is_filled = [clip.samples is not None for clip, _ in slots]
        frames: torch.Tensor | None = None
        if any(is_filled):
            size = self._spec.tower.image_size
            shape = (self._batch, self._spec.views.frames, 3, size, size)
            frames = torch.zeros(shape, pin_memory=self._is_gpu)
            for slot, (clip, sample) in enumerate(slots):
                if clip.samples is not None:
                    frames[slot] = clip.samples[sample]
            frames = self._transferred(frames)
        for clip, sample in slots:
            if sample == self._spec.views.per_clip - 1:
                clip.samples = None  # all of them are in batches now
        transfer_s = time.monotonic() - started
        return _Staged(
            slots=slots, is_filled=is_filled, frames=frames, waited_s=waited_s, transfer_s=transfer_s
        )

    def _transferred(self, frames: torch.Tensor) -> torch.Tensor:
        if self._copies is None:
            return frames.to(self._device)
        with torch.cuda.stream(self._copies):
            there = frames.to(self._device, non_blocking=True)
        self._copies.synchronize()
        return there

    def _one_ahead(self, batches: Iterator[_Staged]) -> Iterator[_Staged]:
        """Yield batches; while one is in use, the gathering thread makes the next."""
        following = self._gatherer.submit(next, batches, None)
        while True:
            started = time.monotonic()
            staged = following.result()
            waited_s = time.monotonic() - started
            if staged is None:
                self._waited.seconds["decoding"] += waited_s
                return
            # The wait is shared out by what gathering and transferring took of the time.
            decoding = staged.waited_s / max(staged.waited_s + staged.transfer_s, 1e-9)
            self._waited.seconds["decoding"] += decoding * waited_s
            self._waited.seconds["transfer"] += (1 - decoding) * waited_s
            following = self._gatherer.submit(next, batches, None)
            yield staged

    def _start(self, staged: _Staged) -> "Future[None]":
        """Run a batch and begin to make its rows. Return a future that is done when they are made."""
        features = None if staged.frames is None else self._backbone(staged.frames)
        if self.makes_rows_beside:
            ran = torch.cuda.current_stream(self._device).record_event() if self._is_gpu else None
            return self._row_maker.submit(self._make_rows, staged, features, ran)
        self._make_rows(staged, features, None)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _make_rows(self, staged: _Staged, features: Features | None, ran: torch.cuda.Event | None) -> None:
        """Give each sample's row to its clip. `staged` is kept until then, as another stream owns its memory."""
        with torch.cuda.stream(self._rows):  # None changes no stream
            if self._rows is not None and ran is not None:
                self._rows.wait_event(ran)
            for slot, (clip, _) in enumerate(staged.slots):
                if features is not None and staged.is_filled[slot]:
                    clip.add(features, slot, self._spec)
        for clip, _ in staged.slots:
            clip.slots_left -= 1

    def close(self) -> None:
        """Wait for its threads."""
        self._gatherer.shutdown(wait=True, cancel_futures=True)
        self._row_maker.shutdown(wait=True, cancel_futures=True)


def _ready(waiting: deque[ClipRows]) -> Iterator[ClipRows]:
    while waiting and waiting[0].is_ready:
        yield waiting.popleft()
