"""Where the processes of a run meet: the address and port of the first of them, as torchrun tells them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from evl_cache.errors import UsageError


def master() -> tuple[str, int]:
    """Return MASTER_ADDR and MASTER_PORT. Raises: UsageError where one is not set, or the port is none."""
    address, text = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not text:
        raise UsageError(
            f"{'MASTER_PORT' if address else 'MASTER_ADDR'} is not set, so that the processes of this run "
            f"(WORLD_SIZE {os.environ.get('WORLD_SIZE')}) cannot meet; start them with torchrun, or set it to the same in all"
        )
    port = int(text) if re.fullmatch("[0-9]{1,5}", text) else 0
    if not 1 <= port <= 65535:
        raise UsageError(
            f"MASTER_PORT is {text!r}; expected a port, 1 to 65535: set it to the same in all processes"
        )
    return address, port


def port_trouble(error: RuntimeError, port: int) -> str | None:
    """Return why the first process may not listen at its port, and what to do; None where torch tells of something else."""
    if "EADDRINUSE" in str(error):
        return (
            f"MASTER_PORT {port} is in use on this computer, perhaps by another run; choose another MASTER_PORT for all "
            "processes (torchrun --master-port), or wait for the other program's end"
        )
    if "EACCES" in str(error):
        return f"MASTER_PORT {port} may not be opened by this user; choose one above 1023 for all processes"
    return None


@contextmanager
def listening_at(port: int) -> Iterator[None]:
    """Raises: UsageError where the first process may not listen at its port."""
    try:
        yield
    except RuntimeError as error:
        if told := port_trouble(error, port):
            raise UsageError(told) from error
        raise
