"""When a request of a service is sent again, and how long that waits."""

from __future__ import annotations

import math

FIRST_WAIT_S = 0.5  # before another try, at least; twice as long before each further one
MOST_TOLD_S = 60.0  # who is told to wait for longer gets the error at once


def told_wait_s(retry_after: str) -> float | None:
    """Seconds of a Retry-After header; None where it says none: it may hold a date, as our own server's never does."""
    try:
        seconds = float(retry_after)
    except ValueError:
        return None
    return seconds if 0.0 <= seconds < math.inf else None


def may_pass(status: int, told_s: float | None = None) -> bool:
    """Whether a request that got this HTTP status may get through another time, soon by what the service told."""
    return (status in (408, 409, 429) or status >= 500) and (told_s or 0.0) <= MOST_TOLD_S


def wait_s(tries: int, told_s: float | None) -> float:
    """Before another try after so many; at least what the service told."""
    return max(FIRST_WAIT_S * 2**tries, told_s or 0.0)
