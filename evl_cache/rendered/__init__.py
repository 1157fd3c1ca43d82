"""Videos drawn by seed: the demo's, and the benchmarks that need no download."""

from evl_cache.rendered.files import write_video
from evl_cache.rendered.loops import (
    DEFAULT_CLIPS_PER_CLASS,
    MOTION_CLASSES,
    REVERSED_PAIRS,
    motion_frames,
    render_motions,
)

__all__ = [
    "DEFAULT_CLIPS_PER_CLASS",
    "MOTION_CLASSES",
    "REVERSED_PAIRS",
    "motion_frames",
    "render_motions",
    "write_video",
]
