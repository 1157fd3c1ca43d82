"""Run directories of trained heads: written, read, scored; imported from the official code."""

from evl_cache.runs.directory import (
    RunConfig,
    RunFile,
    check_no_others_files,
    load_state,
    read_run_config,
    save_state,
    write_run_config,
)
from evl_cache.runs.evaluate import run_loader
from evl_cache.runs.fit import (
    check_features,
    check_reads,
    feature_differences,
    frame_rules_differ,
    head_reads,
)
from evl_cache.runs.head_files import load_head, save_head
from evl_cache.runs.log import RunLog
from evl_cache.runs.official_checkpoint import load_official_checkpoint
from evl_cache.runs.scoring import HeadInputs, Scores, ViewSums, head_inputs, head_logits, score, scores_of
from evl_cache.runs.tables import write_report
from evl_cache.runs.whole_files import whole_file, write_json, write_text
from evl_cache.runs.writer import RUNS_NAME, OnWait, RunWriter, new_run_directory, removed_if_empty, writing

__all__ = [
    "RUNS_NAME",
    "HeadInputs",
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
    "feature_differences",
    "frame_rules_differ",
    "head_inputs",
    "head_logits",
    "head_reads",
    "load_head",
    "load_official_checkpoint",
    "load_state",
    "new_run_directory",
    "read_run_config",
    "removed_if_empty",
    "run_loader",
    "save_head",
    "save_state",
    "score",
    "scores_of",
    "whole_file",
    "write_json",
    "write_report",
    "write_run_config",
    "write_text",
    "writing",
]
