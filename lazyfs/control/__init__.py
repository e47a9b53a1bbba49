"""The control socket of a worker, and its client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Answers a request: takes the body, a JSON object, and returns text or an object to send as JSON,
# or an awaitable of either.
Route = Callable[[dict[str, Any]], Any]
