"""Batches of samples for stage two: their order in an epoch, and how they are read from a cache."""

from evl_cache.batches.batch import Batch, LoaderTimes
from evl_cache.batches.epoch_order import BatchPart, EpochOrder
from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.batches.folds import split_clips
from evl_cache.batches.resident import ResidentSamples, default_budget
from evl_cache.batches.source import DEFAULT_BATCH, Loader, Source, samples_of_clips

__all__ = [
    "DEFAULT_BATCH",
    "Batch",
    "BatchPart",
    "EpochOrder",
    "FeatureLoader",
    "Loader",
    "LoaderTimes",
    "ResidentSamples",
    "Source",
    "default_budget",
    "samples_of_clips",
    "split_clips",
]
