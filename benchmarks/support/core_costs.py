"""What one core does of stage one, measured, and what `estimate --cluster` makes of it."""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.support.memory_extraction import StubTower
from benchmarks.support.stored_features import as_bytes, generated_rows, write_rows
from evl_cache.extract.cluster_costs import Assumptions, cluster_costs
from evl_cache.spec import CacheSpec
from evl_cache.store import Row, make_rows

_SYNCED_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class CoreCosts:
    """Rates of one core, and of the disk.

    Attributes:
        compress_mb_s: before the codec: differences and compression.
        append_mb_s: after the codec: checksums, digests, copies, what is read back.
        disk_gb_s: of files that are written and synced.
    """

    compress_mb_s: float
    append_mb_s: float
    disk_gb_s: float


def core_costs(scratch: Path, *, samples: int = 64, rounds: int = 3) -> CoreCosts:
    """Measure processor time, which other work on the computer changes less than the time by the clock."""
    rows = generated_rows(8)
    raw_bytes = as_bytes(rows[0]) * samples
    took = {codec: _processor_s(scratch, rows, samples, codec, rounds) for codec in ("raw", "default")}
    append_s_a_byte = took["raw"][0] / took["raw"][1]
    seconds, stored_bytes = took["default"]
    compress_s = max(1e-9, seconds - append_s_a_byte * stored_bytes)
    return CoreCosts(
        compress_mb_s=raw_bytes / compress_s / 1e6,
        append_mb_s=1 / append_s_a_byte / 1e6,
        disk_gb_s=_SYNCED_BYTES / _least(lambda: _sync_s(scratch / "synced"), rounds) / 1e9,
    )


def _processor_s(scratch: Path, rows: list[Row], samples: int, codec: str, rounds: int) -> tuple[float, int]:
    """Processor seconds of writing a cache, and the bytes of its shards."""
    found: list[tuple[float, int]] = []
    for _ in range(rounds + 1):
        cache = scratch / "core-costs"
        began = time.process_time()
        write_rows(cache, rows, samples=samples, codec=codec)
        seconds = time.process_time() - began
        found.append((seconds, sum(file.stat().st_size for file in cache.glob("*/c.*"))))
        shutil.rmtree(cache)
    return sorted(found[1:])[rounds // 2]


def rows_ms(spec: CacheSpec, device: str, *, batch: int, rounds: int = 3) -> float:
    """Measure the processor time of a sample's row, made alone, a batch at a time as stage one makes them.

    It is that of all threads; beside a GPU, which makes the rows, that of starting its work and of waiting for it.
    """
    views = spec.views.frames, 3, spec.tower.image_size, spec.tower.image_size
    features = StubTower(spec, device)(torch.empty(1).expand(batch, *views))
    tokens = [features.tokens[layer] for layer in spec.stored_layers]
    maps = [features.maps[layer] for layer in spec.layers] if features.maps else None
    took: list[float] = []
    for _ in range(rounds + 1):  # the first does not count: threads are started
        began = time.process_time()
        make_rows(tokens, maps, spec)
        took.append(time.process_time() - began)
    return 1e3 * statistics.median(took[1:]) / batch


def _sync_s(path: Path) -> float:
    part = os.urandom(1 << 20)
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(_SYNCED_BYTES // len(part)):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def _least(call: Callable[[], float], rounds: int) -> float:
    return min(call() for _ in range(rounds))


def predicted_rate(
    spec: CacheSpec, costs: CoreCosts, *, cores: int, rows_ms: float, device_s: float, border_s: float
) -> tuple[float, str]:
    """Return the samples a second that `estimate --cluster 1` gives, and what limits them.

    Args:
        cores: of the machine.
        rows_ms: core time of a sample before it is compressed: decoding it, or on a CPU making its rows.
        device_s: of a sample.
        border_s: of the cache.
    """
    tflop = cluster_costs(spec, 1, Assumptions()).tflop_a_sample
    assumed = Assumptions(
        device_tflops=tflop / device_s,
        decode_ms=rows_ms,
        compress_mb_s=costs.compress_mb_s,
        append_mb_s=costs.append_mb_s,
        cores_per_device=cores,
        disk_gb_s=costs.disk_gb_s,
        border_s=border_s,
        video_mb=1e-6,
    )
    found = cluster_costs(spec, 1, assumed)
    return spec.num_samples / (found.total_hours * 3600), found.limited_by
