"""Batches of samples for stage two: their order in an epoch, and how they are read from a cache."""

from evl_cache.batches.batch import Batch, BatchOverwritten, LoaderTimes, without_hold
from evl_cache.batches.batch_memory import DEVICE_RING, DEVICE_SLOTS, RING, BatchMemory
from evl_cache.batches.epoch_order import BatchPart, EpochOrder, Keepers, check_seed, shared_out
from evl_cache.batches.feature_loader import FeatureLoader, served_samples
from evl_cache.batches.folds import split_clips
from evl_cache.batches.reading_threads import read_threads
from evl_cache.batches.resident import KEPT_SHARE, ResidentSamples, default_budget, nbytes_of
from evl_cache.batches.source import DEFAULT_BATCH, Loader, Source, samples_of_clips

__all__ = [
    "DEFAULT_BATCH",
    "DEVICE_RING",
    "DEVICE_SLOTS",
    "KEPT_SHARE",
    "RING",
    "Batch",
    "BatchMemory",
    "BatchOverwritten",
    "BatchPart",
    "EpochOrder",
    "FeatureLoader",
    "Keepers",
    "Loader",
    "LoaderTimes",
    "ResidentSamples",
    "Source",
    "check_seed",
    "default_budget",
    "nbytes_of",
    "read_threads",
    "samples_of_clips",
    "served_samples",
    "shared_out",
    "split_clips",
    "without_hold",
]
