"""Videos drawn by seed: the demo's, and the benchmarks that need no download."""

from evl_cache.rendered.benchmarks import BENCHMARKS, begun_options, is_rendered, render
from evl_cache.rendered.demo_motions import (
    DEFAULT_CLIPS_PER_CLASS,
    MOTION_CLASSES,
    REVERSED_PAIRS,
    motion_frames,
    render_motions,
)
from evl_cache.rendered.files import write_video

__all__ = [
    "BENCHMARKS",
    "DEFAULT_CLIPS_PER_CLASS",
    "MOTION_CLASSES",
    "REVERSED_PAIRS",
    "begun_options",
    "is_rendered",
    "motion_frames",
    "render",
    "render_motions",
    "write_video",
]
