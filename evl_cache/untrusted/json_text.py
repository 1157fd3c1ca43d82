"""Read JSON from strangers as the standard defines it, without what Python accepts beyond it."""

import json
from typing import Any, NoReturn


def parse_json(text: bytes | str) -> Any:
    """Return plain values. Raises: ValueError for what is not JSON, such as NaN and infinities, or is nested too deep."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
