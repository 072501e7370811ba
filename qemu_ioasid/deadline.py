# SPDX-License-Identifier: GPL-2.0-or-later
"""One time budget, passed down: every wait knows what it waits for and how long it may."""

from __future__ import annotations

import functools
import os
import time

from qemu_ioasid.errors import ConfigurationError, DeadlineExceeded

#: What `_spin` takes on the 2-core machine whose figures the budgets were set by, in seconds.
_REFERENCE = 0.035


def _spin() -> float:
    started = time.perf_counter()
    total = 0
    for number in range(400_000):
        total += number * number & 7
    return time.perf_counter() - started


@functools.cache
def calibration() -> float:
    """How much slower than the reference this machine is: 1.0 to 8.0, measured once.

    ``QEMU_IOASID_TIME_SCALE`` multiplies it (a debug kernel, a loaded builder).
    Raises ConfigurationError when that is not a positive number.
    """
    text = os.environ.get("QEMU_IOASID_TIME_SCALE") or "1"
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale <= 100:
        raise ConfigurationError(
            f"QEMU_IOASID_TIME_SCALE={text}: must be a number above 0, 100 at most"
        )
    return min(8.0, max(1.0, min(_spin() for _ in range(3)) / _REFERENCE)) * scale


class Deadline:
    """A moment by which *what* must have happened.

    *seconds* are of the reference machine; `calibration` stretches them.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self.what = what
        self.seconds = seconds * calibration()
        self._start = time.monotonic()
        self._end = self._start + self.seconds

    def remaining(self) -> float:
        """Seconds left; raises DeadlineExceeded when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.exceeded()
        return left

    def elapsed(self) -> float:
        """Seconds since the deadline was set."""
        return time.monotonic() - self._start

    def exceeded(self) -> DeadlineExceeded:
        """The error to raise when a wait bounded by `remaining` came back empty-handed."""
        return DeadlineExceeded(f"no {self.what} after {self.seconds:.0f} s")
