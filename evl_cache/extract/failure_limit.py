"""How many clips may fail before an extraction is stopped."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evl_cache.errors import TooManyFailures, UsageError
from evl_cache.notation import command_line
from evl_cache.store import ClipRecord

# Without --max-failures. Real lists have one or two bad files in a hundred; more is a fault of something else.
DEFAULT_PERCENT, DEFAULT_FROM_CLIPS, DEFAULT_IN_A_ROW = 5.0, 100, 50
# Where not one was read before them: fewer than a block has, so that a run that cannot work ends soon.
DEFAULT_FROM_THE_START = 20
_SEGMENT = re.compile(r"segment \S+ ")  # as `segments.frames_of_segment` names it


@dataclass(frozen=True, kw_only=True)
class FailureLimit:
    """How many clips may fail: a number, or a share in percent of those done so far."""

    count: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, text: str) -> "FailureLimit":
        """The limit that `20` or `5%` names. Raises: UsageError for anything else."""
        number = text.strip().removesuffix("%")
        try:
            if text.strip().endswith("%") and 0.0 <= float(number) <= 100.0:
                return cls(percent=float(number))
            if number == text.strip() and int(number) >= 0:
                return cls(count=int(number))
        except ValueError:
            pass  # raised below, as for numbers out of range
        raise UsageError(f"--max-failures {text!r}; expected a number of clips, or a share such as 5%")

    def is_exceeded(self, failed: int, *, of: int) -> bool:
        """Whether so many failures of so many clips are too many."""
        return failed > self.count if self.count is not None else 100.0 * failed > (self.percent or 0.0) * of

    def __str__(self) -> str:
        return str(self.count) if self.count is not None else f"{self.percent:g}%"


@dataclass(frozen=True, kw_only=True)
class FailureCount:
    """Clips that a run has seen, and how many failed.

    Attributes:
        limit: of the user; None for the default, which counts the clips of this run only.
        uncounted: ids of clips that are expected to fail.
        seen: clips counted.
        failed: those that failed.
        in_a_row: those that failed since the last that did not; segments of one video that fail alike are one.
        most_in_a_row: the most that failed without one between them.
        last_reason: of the last that failed.
        failed_apart: those that failed, of which segments of one video that fail alike, one after another, are one.
        last_source: sha256 of its video.
    """

    limit: FailureLimit | None = None
    uncounted: Collection[str] = frozenset()
    seen: int = 0
    failed: int = 0
    in_a_row: int = 0
    most_in_a_row: int = 0
    last_reason: str = ""
    failed_apart: int = 0
    last_source: str | None = None

    def after(self, clips: Sequence[ClipRecord], *, expected: Collection[str] = ()) -> "FailureCount":
        """The count with these clips, in the order of the list; `expected`: failed before, and were accepted."""
        seen, failed, in_a_row = self.seen, self.failed, self.in_a_row
        most, reason, source = self.most_in_a_row, self.last_reason, self.last_source
        apart = self.failed_apart
        for clip in clips:
            if clip.error is not None and (clip.id in self.uncounted or clip.id in expected):
                continue
            seen += 1
            if clip.error is None:
                in_a_row, source = 0, None
                continue
            # Reasons that name no segment name the file: equal files under other names are others.
            is_same_video = source is not None and source == clip.source_sha256
            is_same_video = is_same_video and _kind(reason) == _kind(clip.error)
            in_a_row, apart = in_a_row + (not is_same_video), apart + (not is_same_video)
            failed, reason, source = failed + 1, clip.error, clip.source_sha256
            most = max(most, in_a_row)
        return replace(
            self,
            seen=seen,
            failed=failed,
            in_a_row=in_a_row,
            most_in_a_row=most,
            last_reason=reason,
            failed_apart=apart,
            last_source=source,
        )

    def after_others(self, clips: Sequence[ClipRecord]) -> "FailureCount":
        """The count with clips of a block found done. Those of the default limit are this run's own."""
        return self if self.limit is None else self.after(clips)

    def check(self, cache_path: Path, *, is_written: bool = False) -> None:
        """Raises: TooManyFailures where these are too many.

        Args:
            is_written: the last block is in the cache.
        """
        if (excess := self._excess()) is None:
            return
        look = command_line(("evl-cache", "info", "--failures"), str(cache_path)) or "the failures"
        raise TooManyFailures(
            f"{excess}; the last: {self.last_reason or 'found failed'}; "
            f"{f'see {look}' if is_written else f'its block was not written, see {look} for those before'}; mend what is "
            "wrong and run the same command again, or accept them with "
            f"{'--max-failures 100%' if self.limit is None else 'a higher --max-failures'}"
        )

    def check_start(self) -> None:
        """Raises: TooManyFailures where every clip failed that this run has seen, and they are many; not with a limit."""
        if self.limit is None and self.seen == self.failed and self.in_a_row >= DEFAULT_FROM_THE_START:
            raise TooManyFailures(
                f"each of the first {self.seen} clips failed; the last: {self.last_reason}; mend what is wrong and run "
                "the same command again, or go on through clips that fail with --max-failures 100%"
            )

    def _excess(self) -> str | None:
        """What is too much; None where nothing is."""
        told = f"{self.failed} of {self.seen} clips failed"
        if self.limit is not None:
            is_exceeded = self.limit.is_exceeded(self.failed, of=self.seen)
            return f"{told}, more than --max-failures {self.limit}" if is_exceeded else None
        if self.most_in_a_row >= DEFAULT_IN_A_ROW:
            return f"{told}, {self.most_in_a_row} in a row"
        if self.seen >= DEFAULT_FROM_CLIPS and 100.0 * self.failed_apart > DEFAULT_PERCENT * self.seen:
            return f"{told}, more than {DEFAULT_PERCENT:g} %"
        return None


def _kind(reason: str) -> str:
    """Return a reason without the segment that it is of."""
    return _SEGMENT.sub("", reason)
