"""Stage one: the frozen tower runs once per clip, and its features are written to a cache."""

from evl_cache.extract.decoding import decoding_for
from evl_cache.extract.defaults import default_batch_on, default_workers_on
from evl_cache.extract.grown import Progress
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.outages import OnOutage, Surroundings
from evl_cache.extract.prepare import Decode, PreparedClip, begin_crop_thread, prepare_clip
from evl_cache.extract.request import ExtractRequest, OnRead, SplitsRead, extract_dataset, plan_extraction
from evl_cache.extract.stage import ExtractResult, extract

__all__ = [
    "Decode",
    "ExtractOptions",
    "ExtractRequest",
    "ExtractResult",
    "ExtractionJob",
    "OnOutage",
    "OnRead",
    "PreparedClip",
    "Progress",
    "SplitsRead",
    "Surroundings",
    "begin_crop_thread",
    "decoding_for",
    "default_batch_on",
    "default_workers_on",
    "extract",
    "extract_dataset",
    "plan_extraction",
    "prepare_clip",
]
