"""Read data sets from a disk: every reader returns clip lists by split."""

from evl_cache.datasets.folder import read_folder
from evl_cache.datasets.list_file import read_list_file
from evl_cache.datasets.missing import check_missing, missing_clips
from evl_cache.datasets.places import is_video
from evl_cache.datasets.registry import DATASETS, DatasetReader

__all__ = [
    "DATASETS",
    "DatasetReader",
    "check_missing",
    "is_video",
    "missing_clips",
    "read_folder",
    "read_list_file",
]
