"""What a cache would cost: bytes and files, time measured on a few clips, and what a cluster takes on paper."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from evl_cache.extract.cluster_costs import Assumptions, ClusterCosts, cluster_costs
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.request import ExtractRequest, OnRead, plan_extraction
from evl_cache.extract.stage import extract
from evl_cache.store import array_layouts, num_files, projections_nbytes, sample_nbytes

MEASURED_CLIPS = 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one cache would cost.

    Attributes:
        split: of the data set.
        cache: path of the directory that `extract` would write.
        clips: how many.
        samples: clips times views.
        files: of the finished cache.
        raw_bytes: before the codec.
        expected_bytes: after the codec, as other caches were compressed.
        measured_bytes: scaled from a few clips; None unless asked for.
        measured_seconds: scaled from a few clips; None unless asked for.
        cluster: what several devices would take, on paper; None unless asked for.
    """

    split: str
    cache: str
    clips: int
    samples: int
    files: int
    raw_bytes: int
    expected_bytes: int
    measured_bytes: int | None
    measured_seconds: float | None
    cluster: ClusterCosts | None = None


def estimate(
    request: ExtractRequest,
    *,
    options: ExtractOptions,
    measure: bool,
    cluster: int | None = None,
    assumed: Assumptions | None = None,
    on_read: OnRead = lambda read: None,
) -> list[Estimate]:
    """Costs of every cache that `extract` with the same request would make; nothing of it is kept.

    Args:
        measure: also extract a few clips of each.
        cluster: devices for which costs are worked out on paper too.
        assumed: what those devices are taken to do.
        on_read: as `plan_extraction` takes it.

    Raises: as `plan_extraction`; CacheError where the few clips measured all failed; UsageError.
    """
    jobs = plan_extraction(request, device=options.device, on_read=on_read)
    found = [_estimate(job, options, measure) for job in jobs]
    if cluster is None:
        return found
    return [
        replace(row, cluster=cluster_costs(job.spec, cluster, assumed or Assumptions()))
        for row, job in zip(found, jobs, strict=True)
    ]


def _estimate(job: ExtractionJob, options: ExtractOptions, measure: bool) -> Estimate:
    spec = job.spec
    raw, expected = sample_nbytes(spec)
    once, samples = projections_nbytes(spec), spec.num_samples
    measured = _measure(job, options) if measure else None
    return Estimate(
        split=spec.split,
        cache=str(job.cache_path),
        clips=spec.num_clips,
        samples=samples,
        files=num_files(spec),
        raw_bytes=raw * samples + once,
        expected_bytes=expected * samples + once,
        measured_bytes=None if measured is None else round(measured[0] * spec.num_clips) + once,
        measured_seconds=None if measured is None else measured[1] * spec.num_clips,
    )


def _measure(job: ExtractionJob, options: ExtractOptions) -> tuple[float, float]:
    """(bytes, seconds) a clip, from clips spread over the list."""
    every = job.clips.clips
    clips = replace(job.clips, clips=every[:: max(1, len(every) // MEASURED_CLIPS)][:MEASURED_CLIPS])
    count = len(clips.clips)
    with tempfile.TemporaryDirectory(prefix="evl-cache-estimate-") as directory:
        spec = replace(job.spec, num_clips=count, content_id=clips.content_id)
        few = replace(job, clips=clips, spec=spec, cache_path=Path(directory) / "cache")
        result = extract(few, options=options)
        shards = [
            layout.shard(few.cache_path, block)
            for layout in array_layouts(spec).values()
            for block in range(spec.num_blocks)
        ]
        stored = sum(shard.stat().st_size for shard in shards)
    return stored / count, result.seconds / count
