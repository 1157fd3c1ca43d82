"""The one family of errors that a user can meet.

Every message says what was got, what was expected and what to do, in one line: the command line prints it
as it is.
"""


class EvlCacheError(Exception):
    """Base of all errors raised on purpose by evl-cache."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in the place of a traceback (IPython looks for this name): the line alone."""
        return [f"{type(self).__name__}: {self}"]


class UsageError(EvlCacheError, ValueError):
    """An option, argument or input file is wrong; nothing was changed."""


class ClipError(EvlCacheError):
    """One clip cannot be used (decoding, sampling, non-finite features). The run goes on without it."""


class WeightsError(EvlCacheError):
    """Weights cannot be had, or do not belong to the model."""


class WeightsUnavailable(WeightsError):
    """Weights that exist elsewhere could not be fetched."""


class CacheError(EvlCacheError):
    """A cache cannot be opened, written, or does not hold what is asked for."""


class NoCacheHere(CacheError):
    """A place holds no cache."""


class CacheDamaged(CacheError):
    """Bytes of a cache are not those its marks promise."""


class WorkerError(EvlCacheError):
    """A process of ours cannot do its work, for a reason that lies in the installation and in no clip."""


class TooManyFailures(EvlCacheError):
    """More clips failed than the user allows: a run that goes wrong is stopped early."""
