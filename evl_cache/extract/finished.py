"""A complete cache in a place that cannot be written, such as a read-only disk: extracting it again has nothing to do."""

import os

import numpy as np

from evl_cache.errors import CacheDamaged
from evl_cache.extract.job import ExtractionJob
from evl_cache.store import LOCKS_NAME, FeatureCache, settled_digest


def found_finished(job: ExtractionJob) -> FeatureCache | None:
    """Return the job's cache where it cannot be written and need not be; None where the job has to go on.

    It need not be where every block has the mark that the manifest names. What has to be written and cannot be, fails
    later, with the reason.
    """
    directories = (job.cache_path, job.cache_path / LOCKS_NAME)
    if all(os.access(directory, os.W_OK) for directory in directories if directory.is_dir()):
        return None
    cache = FeatureCache(job.cache_path)
    if settled_digest(job.cache_path, job.spec) is not None:
        return cache
    try:
        cache.check_marks(np.arange(len(cache)))
    except CacheDamaged:
        return None
    is_settled = cache.index_digest is None and cache.is_complete and cache.has_manifest
    return cache if is_settled else None
