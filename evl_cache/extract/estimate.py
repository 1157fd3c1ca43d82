"""What a cache would cost: bytes, files, measured on a few clips time, and on paper what a cluster takes."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from evl_cache.extract.cluster_costs import Assumptions, ClusterCosts, cluster_costs
from evl_cache.extract.request import ExtractRequest, Plan, plan_extraction
from evl_cache.extract.stage import ExtractOptions, extract
from evl_cache.store import num_files, projections_nbytes, sample_nbytes
from evl_cache.towers import Tower

MEASURED_CLIPS = 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one cache. `measured_bytes` and `measured_seconds` are scaled from a few clips; None unless asked for.

    `cluster`: on paper, of several devices; None unless asked for.
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
) -> list[Estimate]:
    """Costs of every cache that `extract` with the same request would make; nothing of it is kept.

    cluster: also for so many devices, on paper. assumed: of them.

    Raises: as `plan_extraction`; CacheError where the few clips measured all failed; UsageError.
    """
    tower, root, plans = plan_extraction(request, device=options.device)
    found = [_estimate(tower, root, plan, options, measure) for plan in plans]
    if cluster is None:
        return found
    return [
        replace(row, cluster=cluster_costs(plan.spec, cluster, assumed or Assumptions()))
        for row, plan in zip(found, plans, strict=True)
    ]


def _estimate(tower: Tower, root: Path, plan: Plan, options: ExtractOptions, measure: bool) -> Estimate:
    raw, expected = sample_nbytes(plan.spec)
    once, samples = projections_nbytes(plan.spec), plan.spec.num_samples
    measured = _measure(tower, root, plan, options) if measure else None
    return Estimate(
        split=plan.split,
        cache=str(plan.cache),
        clips=plan.spec.num_clips,
        samples=samples,
        files=num_files(plan.spec),
        raw_bytes=raw * samples + once,
        expected_bytes=expected * samples + once,
        measured_bytes=None if measured is None else round(measured[0] * plan.spec.num_clips) + once,
        measured_seconds=None if measured is None else measured[1] * plan.spec.num_clips,
    )


def _measure(tower: Tower, root: Path, plan: Plan, options: ExtractOptions) -> tuple[float, float]:
    """(bytes, seconds) a clip, from clips spread over the list."""
    step = max(1, len(plan.clips.clips) // MEASURED_CLIPS)
    chosen = replace(plan.clips, clips=plan.clips.clips[::step][:MEASURED_CLIPS])
    spec = replace(plan.spec, num_clips=len(chosen.clips), content_id=chosen.content_id)
    with tempfile.TemporaryDirectory(prefix="evl-cache-estimate-") as directory:
        cache = Path(directory) / "cache"
        result = extract(chosen, root=root, cache=cache, spec=spec, tower=tower, options=options)
        stored = sum(file.stat().st_size for file in cache.rglob("c/**/*") if file.is_file())
    return stored / len(chosen.clips), result.seconds / len(chosen.clips)
