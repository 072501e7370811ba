"""Waits with an end that say what they waited for."""

from __future__ import annotations

import os
import time

YIELDING = 0.2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


def wait_for(what: str, seconds: float, probe: Callable[[], T | None], pause: float = 0.0005) -> T:
    """Calls probe until it answers other than None, and returns that.

    For what has no event to wait on: memory that a device writes, a debugfs file. Between two
    probes it yields, so that whoever is being waited for can run; after YIELDING seconds it sleeps
    for pause seconds instead.

    Raises TimeoutError, naming what, after seconds; the probe is called once more at the end.
    """
    start = time.monotonic()
    while True:
        passed = time.monotonic() - start
        answer = probe()
        if answer is not None:
            return answer
        if passed >= seconds:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        if passed < YIELDING:
            os.sched_yield()
        else:
            time.sleep(pause)
