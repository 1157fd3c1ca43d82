"""Extraction into a cache that has grown, or grows: each of the caches that it is made of is extracted, then named."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from evl_cache.extract.growth import Growth
from evl_cache.extract.job import ExtractOptions, OnBottleneck, OnClip
from evl_cache.extract.outages import OnOutage
from evl_cache.extract.stage import ExtractResult, extract
from evl_cache.processes import Rendezvous
from evl_cache.spec import CacheSpec
from evl_cache.store import FeatureCache, add_to_cache, renew_grown

Progress = Callable[[CacheSpec], AbstractContextManager[tuple[OnClip, OnBottleneck]]]


def extract_grown(
    growth: Growth,
    *,
    options: ExtractOptions,
    progress: Progress = lambda spec: nullcontext((lambda failed: None, lambda name: None)),
    on_outage: OnOutage = lambda message: None,
    rendezvous: Rendezvous | None = None,
) -> ExtractResult:
    """Extract what a cache lacks, and have readers see it. Run it again after a kill, or beside another job: it goes on.

    Arguments and errors as `extract_dataset`; CacheError where the cache grew otherwise meanwhile.
    """
    started, results = time.monotonic(), list[ExtractResult]()
    cache_path = growth.job.cache_path
    for step in growth.steps:
        # What is there is complete: its rows need no other cache, which may lack some of its layers.
        how = options if step.addition else replace(options, reuse=None)
        with progress(step.job.spec) as (on_clip, on_bottleneck):
            results.append(
                extract(
                    step.job,
                    options=how,
                    on_clip=on_clip,
                    on_bottleneck=on_bottleneck,
                    on_outage=on_outage,
                    rendezvous=rendezvous,
                )
            )
        if step.addition is not None:
            add_to_cache(cache_path, step.addition, lock_expiry_s=options.lock_expiry_s)
    renew_grown(cache_path, lock_expiry_s=options.lock_expiry_s)
    return _as_one(results, FeatureCache(cache_path), time.monotonic() - started)


def _as_one(results: Sequence[ExtractResult], cache: FeatureCache, seconds: float) -> ExtractResult:
    def first(told: Sequence[str | None]) -> str | None:
        return next(filter(None, told), None)

    return ExtractResult(
        clips=cache.spec.num_clips,
        clips_done_here=sum(result.clips_done_here for result in results),
        failures=tuple(cache.failures),
        seconds=seconds,
        cache_digest=cache.fingerprint,
        was_done=all(result.was_done for result in results),
        not_redone=tuple(reason for result in results for reason in result.not_redone),
        sources_changed=first([result.sources_changed for result in results]),
        sources_in_doubt=first([result.sources_in_doubt for result in results]),
        clips_doubtful=sum(result.clips_doubtful for result in results),
        clips_cleared=sum(result.clips_cleared for result in results),
        frames_untold=first([result.frames_untold for result in results]),
    )
