"""JSON from strangers: what the standard says, and nothing that Python reads beyond it."""

import json
from typing import Any, NoReturn


def parse_json(text: bytes | str) -> Any:
    """Plain values. Raises: ValueError for what is no JSON, NaN and infinities included, or is nested too deep."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
