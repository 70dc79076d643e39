"""Reading JSON, whose every damage is an error that the callers expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qdora.errors import UserError


def parse_json(content: str | bytes) -> Any:
    """`json.loads` whose only error is ValueError: text that is not JSON or not UTF-8, or is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, one line, if it is missing, not JSON, or another JSON value."""
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object (got a {type(value).__name__}).")
    return value
