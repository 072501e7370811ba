"""Waits with an end that say what they waited for."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


def wait_for(what: str, seconds: float, probe: Callable[[], T | None], pause: float = 0.0005) -> T:
    """Calls probe until it answers other than None, and returns that.

    For what has no event to wait on: memory that a device writes, a debugfs file. The pause
    between two probes (seconds) gives the only vCPU to whoever is being waited for.

    Raises TimeoutError, naming what, after seconds; the probe is called once more at the end.
    """
    end = time.monotonic() + seconds
    while True:
        late = time.monotonic() >= end
        answer = probe()
        if answer is not None:
            return answer
        if late:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)
