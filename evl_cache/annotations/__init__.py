"""Readers of data sets as they lie on a disk: each gives clip lists, by split."""

from evl_cache.annotations.folder import read_folder
from evl_cache.annotations.list_file import read_list_file
from evl_cache.annotations.missing import check_missing, missing_clips
from evl_cache.annotations.registry import DATASETS, DatasetReader

__all__ = ["DATASETS", "DatasetReader", "check_missing", "missing_clips", "read_folder", "read_list_file"]
