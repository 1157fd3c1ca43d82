"""Draw videos from a seed: the demo's clips, and the benchmarks that need no download."""

from evl_cache.rendered.benchmarks import BENCHMARKS, begun_options, is_rendered, render
from evl_cache.rendered.demo_motions import (
    DEFAULT_CLIPS_PER_CLASS,
    DEMO_CLASSES,
    REVERSED_PAIRS,
    demo_motion_frames,
    render_demo_motions,
)
from evl_cache.rendered.files import write_video
