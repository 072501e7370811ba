"""How often the lines of this kernel ran: its gcov data (Documentation/dev-tools/gcov.rst).

Below FOLDER is the build folder's path, and there for each object that counts its NAME.gcda, made
when it is opened (kernel/gcov/fs.c), beside links that lead nowhere here.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

FOLDER = "/sys/kernel/debug/gcov"


def counts() -> dict[str, dict[str, str]]:
    """The data of every object, by its path below FOLDER. NotADirectoryError: none counts."""
    import binascii
    import zlib

    if not os.path.isdir(FOLDER):
        raise NotADirectoryError(f"{FOLDER}: this kernel does not count (CONFIG_GCOV_KERNEL)")
    files = {}
    for folder, _, names in os.walk(FOLDER):
        for name in names:
            if name.endswith(".gcda"):
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    packed = zlib.compress(file.read())
                files[os.path.relpath(path, FOLDER)] = binascii.b2a_base64(packed).decode()
    return {"files": files}


operations: Mapping[str, Callable[..., Any]] = {"gcov": counts}
