"""The one family of errors that users see.

Every message says in one line what was got, what was expected and what to do; the command line prints it unchanged.
"""

import errno
import os
import re

# What the system says of a path that leads to no file: that may be the file's own fault. (A mount that an automounter
# cannot make is a circle of links, too.)
NO_SUCH_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ}
)
# What libraries say where they get no memory: torch's allocators, CUDA itself, cuBLAS and cuDNN.
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
# What only who may write a cache can do about damage.
_OWNERS_REMEDY = re.compile(
    r"; [^;]*\b(?:repair|evl-cache index|bring the director|put the old video|use the same decoder)[^;]*$"
)
_BEHIND_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
READERS_REMEDY = "tell who keeps the cache, or use another copy of it"
_LIMITS = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files (fs.file-max)",
    errno.ENOMEM: "use fewer --decode-workers, or give the run more memory",
    errno.EAGAIN: "use fewer --decode-workers, or raise the limit of processes (ulimit -u)",
}


class EvlCacheError(Exception):
    """The base of all errors that evl-cache raises on purpose."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows instead of a traceback: the message alone. IPython calls this name."""
        return [f"{type(self).__name__}: {self}"]


class UsageError(EvlCacheError, ValueError):
    """An option, argument or input file is wrong; nothing was changed."""


class NotFinite(UsageError):
    """What is to be saved, scored or shown is NaN or infinite: a head has diverged, or an option led there."""


class ClipError(EvlCacheError):
    """One clip cannot be used (decoding, sampling, non-finite features). The run goes on without it."""


class Outage(EvlCacheError):
    """A disk, a permission or a limit of the system keeps videos from being read: no clip's fault, and it may pass.

    Attributes:
        trouble: what happened.
        remedy: what to do about it.
    """

    def __init__(self, trouble: str, *, remedy: str) -> None:
        super().__init__(f"{trouble}; {remedy}")
        self.trouble, self.remedy = trouble, remedy

    @classmethod
    def of(cls, what: str, error: OSError, *, remedy: str) -> "Outage":
        """Return the outage that an error of the system tells of; where it is a limit, the remedy is to raise it."""
        reason = error.strerror or str(error)
        return cls(f"{what} ({reason})", remedy=_LIMITS.get(error.errno or 0, remedy))


class WeightsError(EvlCacheError):
    """Weights cannot be found or read, or do not belong to the model."""


class WeightsUnavailable(WeightsError):
    """Weights that exist elsewhere could not be downloaded."""


class CacheError(EvlCacheError):
    """A cache cannot be opened or written, or does not hold what is asked for."""


class NoCacheHere(CacheError):
    """There is no cache at this place."""


class Unreachable(CacheError):
    """A place cannot be looked at: a server is silent or refuses, a directory may not be read. What is there is unknown."""


class WaitEnded(CacheError):
    """A wait for a server was ended from outside, by a signal or as other work failed: no fault of the server."""


class CacheDamaged(CacheError):
    """Bytes of a cache are not those that its marks record. Of a cache behind a URL the message advises no repair."""

    def __init__(self, message: str) -> None:
        super().__init__(for_readers(message) if _BEHIND_URL.match(message) else message)


class NotEnoughMemory(EvlCacheError):
    """A device, or the computer, has no memory left for what was to be computed."""


class WorkerError(EvlCacheError):
    """A worker process cannot work at all: something is wrong with the installation, not with a clip."""


class TooManyFailures(EvlCacheError):
    """More clips failed than the user, or the default, allows: the run is stopped before they are recorded."""


def for_readers(message: str) -> str:
    """Return what is said of damage to who can only read the cache: not to repair it, but whom to tell."""
    return _OWNERS_REMEDY.sub(f"; {READERS_REMEDY}", message)


def reason_alone(reason: str, name: str) -> str:
    """Return why a file failed, without the path that such a reason begins with: a line that names the file says it once.

    Args:
        reason: `folder/name.mp4: is damaged`.
        name: the end of that path, with or without its ending; where it is another one the reason stays as it is.
    """
    path = re.compile(rf"(?:.*?/)?{re.escape(os.path.basename(name))}(?:\.\w+)?: ", re.DOTALL)
    found = path.match(reason)
    return reason if found is None else reason[found.end() :]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_want_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that there is no memory, of a GPU or of the computer; torch need not be loaded.

    torch has a class of its own for its CUDA allocator alone. Pinned memory, cuBLAS and the CPU's allocator raise plain
    RuntimeErrors, or newer subclasses of it.
    """
    if not isinstance(error, RuntimeError) or not type(error).__module__.startswith(("torch", "builtins")):
        return False
    return type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(first_line(error)) is not None


def told_of_memory(error: BaseException) -> str:
    """Return what torch says of the memory it did not get, in a few words: how much was asked for, and what was free."""
    text = str(error)
    where = "GPU" if re.search("CUDA|CUBLAS|CUDNN|GPU", text, re.IGNORECASE) else "computer"
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    free = re.search(r"of which ([\d.]+ \w+) is free", text)
    figures = [f"{asked[1]} asked for"] if asked else []
    figures += [f"{free[1]} free"] if free else []
    return f"out of memory on the {where}" + (f" ({', '.join(figures)})" if figures else "")
