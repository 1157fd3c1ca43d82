"""Read data sets from a disk: every reader returns clip lists by split."""

from evl_cache.datasets.missing import check_allowance, check_missing, missing_clips
from evl_cache.datasets.places import describe_passed_over, is_passed_over, is_video
from evl_cache.datasets.registry import DATASETS, DatasetReader
