"""How many clips may fail before an extraction is stopped."""

from dataclasses import dataclass

from evl_cache.errors import UsageError


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
