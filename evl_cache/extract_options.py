"""What options of `extract` stand for: views of the published test recipes, by data set and frames."""

from collections.abc import Mapping
from typing import Any

# Views of the published test recipes (section 4 of arXiv 2208.03550 and its supplement), by data set and frames.
VIEW_RECIPES: Mapping[str, Mapping[str, Any]] = {
    "k400-8": {"frames": 8, "sampling": "strided", "stride": 16, "views": "3x1"},
    "k400-16": {"frames": 16, "sampling": "strided", "stride": 16, "views": "1x3"},
    "k400-32": {"frames": 32, "sampling": "strided", "stride": 8, "views": "1x3"},
    "ssv2-8": {"frames": 8, "sampling": "tsn", "views": "3x1"},
    "ssv2-16": {"frames": 16, "sampling": "tsn", "views": "1x3"},
    "ssv2-32": {"frames": 32, "sampling": "tsn", "views": "1x3"},
}
