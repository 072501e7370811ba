"""What a VM needs to hear when it was restored from a snapshot: the time, and randomness.

Until then it lives at the moment it was saved, with the random numbers of every other rig restored
from the same file.
"""

from __future__ import annotations

import fcntl
import os
import time

from qemu_ioasid.agent.uapi import random as uapi


def set_clock(now: int) -> None:
    """Sets CLOCK_REALTIME to now, in nanoseconds since 1970. Raises OSError."""
    time.clock_settime_ns(time.CLOCK_REALTIME, now)


def reseed(entropy: bytes) -> None:
    """Mixes entropy, credited in full, into the kernel's generator and has it used at once.

    Everything drawn from getrandom() afterwards depends on it (random(4)). Raises OSError.
    """
    head = uapi.rand_pool_info(entropy_count=8 * len(entropy), buf_size=len(entropy))
    fd = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, uapi.RNDADDENTROPY, bytes(head) + entropy)
        fcntl.ioctl(fd, uapi.RNDRESEEDCRNG)
    finally:
        os.close(fd)
