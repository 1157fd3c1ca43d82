"""What can be wrong with a request to a server: each cause in its own words, with its own remedy."""

import email.utils
import http
import time
from collections.abc import Mapping

_PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})

_LONGEST_RETRY_S = 366 * 86400.0  # more is said by a clock that is wrong


class Trouble(Exception):
    """A request failed.

    Attributes:
        reason: what is wrong, as a sentence goes on after the place.
        remedy: what to do about it.
        may_pass: whether it is worth asking again.
        retry_after_s: what the server says of when to ask again.
        has_answered: whether the server said it itself.
    """

    def __init__(
        self,
        reason: str,
        remedy: str,
        *,
        may_pass: bool = False,
        retry_after_s: float | None = None,
        has_answered: bool = False,
    ) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy, self.may_pass = reason, remedy, may_pass
        self.retry_after_s, self.has_answered = retry_after_s, has_answered

    def told(self, failing_s: float) -> str:
        """Return reason and remedy, and for how long it was so."""
        waited = f", for {failing_s:.0f} s" if self.may_pass and failing_s >= 1 else ""
        if self.may_pass and self.retry_after_s:
            waited += f", and asks to be asked again in {self.retry_after_s:.0f} s"
        return f"{self.reason}{waited}; {self.remedy}"

    @classmethod
    def silence(cls, *, has_begun: bool) -> "Trouble":
        """Return the trouble that nothing comes."""
        reason = "its answer stopped half way" if has_begun else "it does not answer"
        remedy = "check that the server works, and the network; run the same command again"
        return cls(reason, remedy, may_pass=True)

    @classmethod
    def broken(cls, what: str = "the connection broke off") -> "Trouble":
        """Return the trouble that an answer did not come whole."""
        return cls(what, "check the connection, then run the same command again", may_pass=True)

    @classmethod
    def compressed(cls, encoding: str) -> "Trouble":
        """Return the trouble that a file comes in another form than it lies there."""
        return cls(
            f"the server compresses its answers ({encoding}), though that was not asked for",
            "have that turned off for the files of caches",
            has_answered=True,
        )


def status_trouble(status: int, headers: Mapping[str, str]) -> Trouble:
    """Return what a status tells that is neither a file nor its absence nor a want of access."""
    try:
        phrase = f"{status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        phrase = f"status {status}"
    if status == 407:
        return Trouble(
            "the proxy wants user and password (407)",
            "put them into HTTP_PROXY and HTTPS_PROXY (http://user:password@proxy:port), or the host into NO_PROXY",
            has_answered=True,
        )
    passes = status in _PASSING_STATUSES
    return Trouble(
        f"the server answers {phrase}",
        "run the same command again later, or ask who keeps the server"
        if passes
        else "check the address, or ask who keeps the server",
        may_pass=passes,
        retry_after_s=retry_after_s(headers.get("retry-after")) if passes else None,
        has_answered=True,
    )


def retry_after_s(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header names, itself or by a date; None where it is neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return min(float(value), _LONGEST_RETRY_S)
    try:
        when = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    return min(max(0.0, when - time.time()), _LONGEST_RETRY_S)
