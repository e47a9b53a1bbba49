"""The control socket of a worker, and its client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Answers a request: it gets the body, a JSON object, and returns what is sent as JSON, or text; or
# an awaitable of that.
Route = Callable[[dict[str, Any]], Any]
