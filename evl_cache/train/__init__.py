"""Stage two: a head trained from a cache, without a video or the backbone."""

from evl_cache.train.batch_size import step_nbytes
from evl_cache.train.head_reads import all_reads, training_reads
from evl_cache.train.loaders import make_loaders, shuffle_blocks
from evl_cache.train.memory import Loads, Room, StepNeeds, kept_nbytes, steps_beside_kept
from evl_cache.train.needs import HeadNeeds
from evl_cache.train.options import DEFAULT_EPOCHS, OPERATIONAL, TrainOptions, options_of
from evl_cache.train.result import OnBottleneck, OnNote, OnStep, TrainResult, read_result
from evl_cache.train.setup import check_caches, pair_differences, prepare_run, run_config, written_by_first
from evl_cache.train.sides import notes_of_sides
from evl_cache.train.stage import train, train_with_loaders
from evl_cache.train.step_loss import Diverged, told_of_training
from evl_cache.train.trainer import Trainer

__all__ = [
    "DEFAULT_EPOCHS",
    "OPERATIONAL",
    "Diverged",
    "HeadNeeds",
    "Loads",
    "OnBottleneck",
    "OnNote",
    "OnStep",
    "Room",
    "StepNeeds",
    "TrainOptions",
    "TrainResult",
    "Trainer",
    "all_reads",
    "check_caches",
    "kept_nbytes",
    "make_loaders",
    "notes_of_sides",
    "options_of",
    "pair_differences",
    "prepare_run",
    "read_result",
    "run_config",
    "shuffle_blocks",
    "step_nbytes",
    "steps_beside_kept",
    "told_of_training",
    "train",
    "train_with_loaders",
    "training_reads",
    "written_by_first",
]
