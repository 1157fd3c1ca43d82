"""Run directories of trained heads: written, read, scored; imported from the official code."""

from evl_cache.runs.classes import ClassMatch, match_classes
from evl_cache.runs.comparable import (
    ALL_CLIPS,
    ONLINE_PREFIX,
    OPERATIONAL,
    clips_of_run,
    comparable_key,
    comparable_rows,
    differences,
    distinct_names,
    is_online,
    is_same_training,
    other_sides,
    samples_digest,
    scored_key,
)
from evl_cache.runs.directory import (
    RunConfig,
    RunFile,
    check_no_others_files,
    load_state,
    read_run_config,
    save_state,
    write_run_config,
)
from evl_cache.runs.evaluate import classes_of_run, run_loader
from evl_cache.runs.finite import extremes, not_finite
from evl_cache.runs.fit import (
    check_features,
    check_reads,
    feature_differences,
    frame_rules_differ,
    head_reads,
)
from evl_cache.runs.head_files import load_head, save_head
from evl_cache.runs.intervals import Interval, deviation_of, spread_text, wilson_interval
from evl_cache.runs.log import RunLog
from evl_cache.runs.official_checkpoint import load_official_checkpoint
from evl_cache.runs.recorded import count_trained_on, names_of, recorded_cache, recorded_clips
from evl_cache.runs.scoring import (
    HeadInputs,
    Scores,
    ViewSums,
    class_probabilities,
    head_inputs,
    head_logits,
    score,
    scores_of,
    view_sums,
)
from evl_cache.runs.tables import write_report
from evl_cache.runs.whole_files import read_json, read_json_lines, whole_file, write_json, write_text
from evl_cache.runs.writer import RUNS_NAME, OnWait, RunWriter, new_run_directory, removed_if_empty, writing

__all__ = [
    "ALL_CLIPS",
    "ONLINE_PREFIX",
    "OPERATIONAL",
    "RUNS_NAME",
    "ClassMatch",
    "HeadInputs",
    "Interval",
    "OnWait",
    "RunConfig",
    "RunFile",
    "RunLog",
    "RunWriter",
    "Scores",
    "ViewSums",
    "check_features",
    "check_no_others_files",
    "check_reads",
    "class_probabilities",
    "classes_of_run",
    "clips_of_run",
    "comparable_key",
    "comparable_rows",
    "count_trained_on",
    "deviation_of",
    "differences",
    "distinct_names",
    "extremes",
    "feature_differences",
    "frame_rules_differ",
    "head_inputs",
    "head_logits",
    "head_reads",
    "is_online",
    "is_same_training",
    "load_head",
    "load_official_checkpoint",
    "load_state",
    "match_classes",
    "names_of",
    "new_run_directory",
    "not_finite",
    "other_sides",
    "read_json",
    "read_json_lines",
    "read_run_config",
    "recorded_cache",
    "recorded_clips",
    "removed_if_empty",
    "run_loader",
    "samples_digest",
    "save_head",
    "save_state",
    "score",
    "scored_key",
    "scores_of",
    "spread_text",
    "view_sums",
    "whole_file",
    "wilson_interval",
    "write_json",
    "write_report",
    "write_run_config",
    "write_text",
    "writing",
]
