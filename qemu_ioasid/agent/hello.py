"""What an agent says of the machine it runs on."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def machine(role: str, kernel: dict[str, bool]) -> dict[str, Any]:
    """Role, release, Python, pid, processors, and the features asked of the kernel by the role."""
    return {
        "role": role,
        "release": os.uname().release,
        "python": sys.version.split()[0],
        "pid": os.getpid(),
        "cpus": os.cpu_count() or 1,
        "kernel": kernel,
    }


def executable(name: str) -> str | None:
    """The path of a program in PATH."""
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = f"{folder}/{name}"
        if os.access(path, os.X_OK):
            return path
    return None
