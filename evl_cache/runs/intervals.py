"""How sure an accuracy is: an interval over the clips scored for one run, a deviation over seeds for several."""

import math
import statistics
from collections.abc import Sequence

Interval = tuple[float, float]  # percent, from and to
_Z = 1.959963984540054  # of 95 %, both sides, of the normal distribution


def wilson_interval(percent: float, clips: int) -> Interval:
    """Return the 95 % interval of an accuracy that was found on some clips, by Wilson's score.

    It says what other clips of the same kind would do to the figure; another seed is another matter. Source: E. B. Wilson,
    Journal of the American Statistical Association 22 (1927), page 209.

    Args:
        percent: of the clips that are right.
        clips: how many were scored; with none, nothing is known.
    """
    if clips < 1:
        return (0.0, 100.0)
    share, weight = percent / 100, _Z**2 / clips
    middle = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / clips + weight / (4 * clips)) / (1 + weight)
    # At both ends the sums are off by rounding.
    low = 0.0 if percent <= 0 else 100 * (middle - half)
    high = 100.0 if percent >= 100 else 100 * (middle + half)
    return (low, high)


def deviation_of(values: Sequence[float]) -> float | None:
    """Return the standard deviation of some runs' figures, as of a sample; None for one run."""
    return statistics.stdev(values) if len(values) > 1 else None


def spread_text(deviation: float | None, interval: Interval | None, *, digits: int = 1) -> str:
    """Return what follows an accuracy: ` ± 1.2` over seeds, ` (36.1 to 97.0)` of one run, or nothing."""
    if deviation is not None:
        return f" ± {deviation:.{digits}f}"
    return "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
