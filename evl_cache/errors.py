"""The one family of errors that users see.

Every message says in one line what was got, what was expected and what to do; the command line prints it unchanged.
"""


class EvlCacheError(Exception):
    """The base of all errors that evl-cache raises on purpose."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows instead of a traceback: the message alone. IPython calls this name."""
        return [f"{type(self).__name__}: {self}"]


class UsageError(EvlCacheError, ValueError):
    """An option, argument or input file is wrong; nothing was changed."""


class ClipError(EvlCacheError):
    """One clip cannot be used (decoding, sampling, non-finite features). The run goes on without it."""


class WeightsError(EvlCacheError):
    """Weights cannot be found or read, or do not belong to the model."""


class WeightsUnavailable(WeightsError):
    """Weights that exist elsewhere could not be downloaded."""


class CacheError(EvlCacheError):
    """A cache cannot be opened or written, or does not hold what is asked for."""


class NoCacheHere(CacheError):
    """There is no cache at this place."""


class CacheDamaged(CacheError):
    """Bytes of a cache are not those that its marks record."""


class WorkerError(EvlCacheError):
    """A worker process cannot work at all: something is wrong with the installation, not with a clip."""


class TooManyFailures(EvlCacheError):
    """More clips failed than the user allows, so the run is stopped early."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
