"""A complete cache in a place that cannot be written, such as a read-only disk: extracting it again has nothing to do."""

import os
from pathlib import Path

from evl_cache.extract.job import ExtractionJob
from evl_cache.store import (
    LOCKS_NAME,
    FeatureCache,
    KnownBlocks,
    manifest_at,
    mark_path,
    settled_digest,
)


def found_finished(job: ExtractionJob) -> FeatureCache | None:
    """Return the job's cache where it cannot be written and need not be; None where the job has to go on.

    It need not be where every block has the mark that the manifest names. What has to be written and cannot be, fails
    later, with the reason.
    """
    directories = (job.cache_path, job.cache_path / LOCKS_NAME)
    if all(os.access(directory, os.W_OK) for directory in directories if directory.is_dir()):
        return None
    cache = FeatureCache(job.cache_path, grown=False)
    if settled_digest(job.cache_path, job.spec) is not None:
        return cache
    # Not by the index, which may be damaged alone: then readers go by the marks.
    manifest, found = manifest_at(job.cache_path, job.spec), KnownBlocks(job.cache_path, job.spec).all()
    if manifest is None:
        return None
    named = (
        manifest.files.get(mark_path(Path(), each.block).as_posix()) == each.file_digest for each in found
    )
    return cache if sum(named) == job.spec.num_blocks else None
