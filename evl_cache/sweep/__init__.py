"""Many heads trained from one reading of a cache: `grid` makes the trainings, `stage` runs them in passes."""

from evl_cache.runs import RUNS_NAME
from evl_cache.sweep.account import SWEEP_NAME, read_sweep
from evl_cache.sweep.stage import sweep
