"""Read JSON from strangers as the standard defines it, without what Python accepts beyond it."""

import json
import math
from typing import Any, NoReturn


def parse_json(text: bytes | str) -> Any:
    """Return plain values. Raises: ValueError for what is not JSON, such as NaN and infinities, or is nested too deep.

    A number too large for a float, such as 1e999, would be read as infinite, and is refused too.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        _refuse(text)
    return number


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name[:40]} is no JSON, or no number that a float holds")
