"""What the kernel has lost: memory that nothing points to (Documentation/dev-tools/kmemleak)."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

KMEMLEAK = "/sys/kernel/debug/kmemleak"
#: An object is reported from this age on, in seconds (mm/kmemleak.c, MSECS_MIN_AGE).
AGE = 5.0
#: As many objects are told.
MOST = 20


def _write(command: str) -> None:
    fd = os.open(KMEMLEAK, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, command.encode())
    finally:
        os.close(fd)


def lost() -> dict[str, list[str]]:
    """What was lost since the boot: the report of each object, the call trace of its making.

    OSError EPERM: the kernel has given up on it.
    """
    # An object that is young may be on its way from one place to another.
    time.sleep(AGE)
    # The first scan takes note of an object's content; one that changes is not lost.
    _write("scan")
    _write("scan")
    with open(KMEMLEAK) as file:
        found = file.read().split("unreferenced object ")[1:]
    return {"lost": [f"unreferenced object {each.strip()}" for each in found[:MOST]]}


operations: Mapping[str, Callable[..., Any]] = {"leaks": lost}
