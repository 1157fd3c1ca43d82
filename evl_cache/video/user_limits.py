"""Limits that a shell or a cluster sets on every process: a clip that would need more is not at fault."""

import errno
import re
import resource

MOST_ADDRESS_SPACE = 16 << 30  # a file with a false frame size must not fill the machine's memory
_OF_MEMORY = ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d"))
# What libraries say where memory, or memory for a thread's stack, is refused. decord ends with FFmpeg's number.
_REFUSED = re.compile(
    r"Cannot allocate memory|\(Resource temporarily unavailable\)|failed to map segment|can't start new thread|bad_alloc"
    rf"|\(-{errno.ENOMEM} vs\. "
)


def memory_limit() -> tuple[int, str] | None:
    """Return the bytes that a process may take, and the command that says so; None where that is enough for any clip."""
    found = [(resource.getrlimit(kind)[0], command) for kind, command in _OF_MEMORY]
    return min(
        ((most, command) for most, command in found if 0 <= most < MOST_ADDRESS_SPACE), default=None
    )  # no limit is a negative number


def limit_address_space() -> None:
    """Give this process no more address space than any clip may need, nor than the user allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = min(number for number in (soft, hard, MOST_ADDRESS_SPACE) if number != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def said_of_memory() -> str:
    """Return the user's limit of memory as the end of a sentence; '' where there is none."""
    limit = memory_limit()
    return "" if limit is None else f"; {limit[1]} gives each process {limit[0] >> 20} MB"


def raise_limit() -> str:
    """Return what may be done about the user's limit of memory, as the end of advice; '' where there is none."""
    limit = memory_limit()
    return "" if limit is None else f", and raise the limit of memory ({limit[1]})"


def refused(error: BaseException) -> tuple[str, str] | None:
    """Return what a user's limit refused, and what to do, where it is the reason of an error; None where it is not."""
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return f"files may have {size} bytes, a clip's frames need more", "raise the limit (ulimit -f)"
    limit = memory_limit()
    if limit is None or not (isinstance(error, MemoryError) or _REFUSED.search(str(error))):
        return None
    trouble = f"needs more memory than the {limit[0] >> 20} MB of a process"
    return trouble, f"raise the limit ({limit[1]}), or move the file away if it alone is at fault"
